"""Bytes of a rank against the ZeRO paper's formulas, real DeepSpeed engines, and what autograd saves."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.config.parsing import read_config
from dga_scale.corpus.loading.batches import Batch as TrainingBatch
from dga_scale.corpus.loading.batches import Counts
from dga_scale.objectives.cross_entropy import cross_entropies
from dga_scale.objectives.methods import build_method
from dga_scale.objectives.training_model import TrainingModel
from dga_scale.planning.activations import Batch, activations, gather_bytes, layer_activations, working_memory
from dga_scale.planning.activations import vocabulary as head_bytes
from dga_scale.planning.memory import Zero, extras, memory, share, states
from dga_scale.planning.models import PlannedModel, build_model
from tests.helpers.engines import held_bytes, saved_bytes
from tests.helpers.ranks import run_ranks
from tests.helpers.training import MaskedLM, Setup, tiny_bert, tiny_engine, train_step

ZERO2 = str(Path(__file__).parents[2] / "ds_configs" / "zero2.json")


def plan_of(model: str, *settings: str) -> PlannedModel:
    method = [] if any(word.startswith("--method") for word in settings) else ["--method", "mlm"]
    arguments = ["--corpus", "any", "--ds_config", ZERO2, *method, *settings]
    return build_model(read_config(["--model", model, *arguments]))


def zero(stage: int, ranks: int, **changes: Any) -> Zero:
    values: dict[str, Any] = {
        "weight_bytes": 2, "accumulation_bytes": 2, "communication_bytes": 4, "offload_optimizer": False,
        "offload_parameters": False, "reduce_bucket": 1000, "overlap": False, "all_reduce": True,
        "live": 10**9, "persistence": 0, "sub_group": 10**9,
    }  # fmt: skip
    return Zero(stage=stage, ranks=ranks, **(values | changes))


@pytest.fixture(scope="module")
def roberta() -> PlannedModel:
    return plan_of("roberta-base")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_states_are_those_of_the_zero_paper(roberta: PlannedModel, ranks: int) -> None:
    p = roberta.parameters
    expected = {  # arXiv 1910.02054, figure 1, K = 12
        0: (2 + 2 + 12) * p,
        1: 4 * p + 12 * p / ranks,
        2: 2 * p + (2 + 12) * p / ranks,
        3: (2 + 2 + 12) * p / ranks,
    }
    for stage, size in expected.items():
        found = states(roberta, zero(stage, ranks)).total
        assert size <= found <= size * 1.0001, stage  # DeepSpeed's padding


def measured(setup: Setup) -> dict[str, int]:
    """Bytes that a rank of a real engine holds after a step."""
    engine = tiny_engine(setup, MaskedLM(tiny_bert()))
    train_step(engine, 0)
    return held_bytes(engine)


def measure_all(setups: list[Setup]) -> list[dict[str, int]]:
    return [measured(setup) for setup in setups]


def test_states_are_those_of_real_engines(tmp_path: Path) -> None:
    bert = tiny_bert()
    bert.config.to_json_file(tmp_path / "config.json", use_diff=False)
    model = plan_of(str(tmp_path / "config.json"))
    assert model.parameters == bert.num_parameters()
    setups = [Setup(stage=stage, precision=kind) for stage in range(4) for kind in ("fp32", "bf16")]
    setups += [Setup(stage=stage, precision="bf16", accumulation=2) for stage in (1, 3)]
    setups += [Setup(stage=2, precision="bf16", weight_decay=0.1)]
    setups += [Setup(stage=3, precision="bf16", persistence=2000)]
    for rank in run_ranks(2, measure_all, setups):
        for setup, found in zip(setups, rank, strict=True):
            expected = dataclasses.asdict(
                states(model, Zero.of(setup.resolved(2), 2), groups=setup.weight_decay > 0)
            )
            if not found["gradients"]:  # they live in parameters and lists, and are gone after the step
                expected["gradients"] = 0
            for part, size in found.items():
                assert size == pytest.approx(expected[part], rel=0.002), (str(setup), part)


@pytest.mark.parametrize("precision", [2, 4])
@pytest.mark.parametrize("method", ["mlm", "kd", "ewc"])
def test_a_higher_stage_takes_less(precision: int, method: str) -> None:
    model = plan_of("xlm-roberta-xl", "--method", method, *(["--general_corpus", "x"] * (method == "ewc")))
    batch = Batch(rows=1, length=64, labels=10, views=1, stacked=1)
    sizes = [
        memory(
            model,
            zero(stage, 64, weight_bytes=precision, accumulation_bytes=precision, reduce_bucket=10**6),
            batch,
            checkpointing=False,
        ).total
        for stage in range(4)
    ]
    assert sizes == sorted(sizes, reverse=True)


def test_more_rows_and_views_take_more_and_recomputing_less(roberta: PlannedModel) -> None:
    small = Batch(rows=4, length=128, labels=19, views=4, stacked=4)
    kept = activations(roberta, small, 2, checkpointing=False)
    assert activations(roberta, dataclasses.replace(small, rows=8), 2, False) == 2 * kept
    assert activations(roberta, dataclasses.replace(small, views=1, stacked=1), 2, False) * 4 == kept
    assert activations(roberta, small, 2, checkpointing=True) < kept / 5
    split = dataclasses.replace(small, stacked=1)
    assert activations(roberta, split, 2, checkpointing=False) == kept
    assert 4 * working_memory(roberta, split, 2, True) == working_memory(roberta, small, 2, True)


@pytest.mark.parametrize("method", ["dga", "das"])
@pytest.mark.parametrize("split", [False, True])
def test_gates_of_heads_keep_both_sides_of_their_product(method: str, split: bool, tmp_path: Path) -> None:
    """What one more block adds in the program's own training model, all four views, in bf16."""
    given = ["--model", str(tmp_path / "config.json"), "--corpus", "any", "--ds_config", ZERO2]
    config = read_config([*given, "--method", method])

    def saved(layers: int) -> int:
        sizes = {**KINDS["roberta"], "num_hidden_layers": layers}
        lm = AutoModelForMaskedLM.from_config(AutoConfig.for_model("roberta", **sizes), dtype=torch.bfloat16)
        anatomy = anatomy_of(lm)
        model = TrainingModel(lm, anatomy, build_method(config), split_views=split).train()
        model.protection.set({kind: torch.full(anatomy.unit_shape(kind), 0.5) for kind in model.method.kinds})
        ids = torch.randint(5, 100, (2, 32))
        positions = torch.arange(8)
        zeros = torch.zeros(len(ids), dtype=torch.int64)
        inputs = TrainingBatch(
            input_ids=ids,
            masked_ids=ids,
            attention_mask=torch.ones_like(ids),
            positions=positions,
            labels=ids.flatten()[positions],
            sample_ids=torch.arange(len(ids)),
            sources=zeros,
            mixed_rows=zeros[:1],
            mixed_label_indices=torch.full((1,), -1),
        )
        counts = Counts((len(positions),), 1)
        return saved_bytes(model, lambda: model(inputs, counts)[0])[1]

    one_more = (saved(4) - saved(2)) / 2
    sizes = AutoConfig.for_model("roberta", num_hidden_layers=2, **KINDS["roberta"])
    sizes.to_json_file(tmp_path / "config.json")
    planned = build_model(config)
    batch = Batch(rows=2, length=32, labels=4, views=4, stacked=1 if split else 4)
    deeper = dataclasses.replace(planned, trained_layers=3)
    added = activations(deeper, batch, 2, False) - activations(planned, batch, 2, False)
    assert added == pytest.approx(one_more, rel=0.05)


def test_reducing_the_embeddings_is_the_peak_with_a_large_vocabulary() -> None:
    """ZeRO-3: weights, gradient, and the gradient twice in what it travels in, of the largest parameter.

    Or, if it travels as it is, before that: the gradients of the LM head and of the lookup, and their sum.
    """
    model = plan_of("xlm-roberta-base")
    batch = Batch(rows=1, length=16, labels=2, views=1, stacked=1)
    for travels, copies in ((4, 2), (2, 1)):
        settings = zero(3, 64, communication_bytes=travels)
        found = memory(model, settings, batch, checkpointing=False)
        largest = 250002 * 768
        besides = found.total - states(model, settings).total
        assert besides == largest * (2 + max(2 + copies * travels, 3 * 2)) + 1000 * 2
    alone = memory(model, zero(3, 1), batch, checkpointing=False)
    assert "gathered weights" not in alone.device


def test_logits_and_their_gradient_are_what_the_head_takes(roberta: PlannedModel) -> None:
    """In bf16, by autograd: what a larger vocabulary adds to what is kept, and as much for the gradient."""
    positions, vocabulary = 64, 5000
    hidden = torch.randn(positions, 16, dtype=torch.bfloat16)
    decoder = torch.nn.Linear(16, vocabulary, dtype=torch.bfloat16)
    labels = torch.arange(positions)
    kept = saved_bytes(decoder, lambda: cross_entropies(decoder(hidden), labels))[1]
    few = Batch(rows=1, length=64, labels=positions, views=1, stacked=1)
    vocabulary_of = partial(dataclasses.replace, roberta.anatomy)
    sizes = [
        head_bytes(dataclasses.replace(roberta, anatomy=vocabulary_of(vocab_size=size)), few, 2)
        for size in (30_000, 30_000 + vocabulary)
    ]
    assert sizes[1] - sizes[0] == pytest.approx(kept + 2 * positions * vocabulary, rel=0.01)


def test_offload_moves_the_optimizer_to_the_host(roberta: PlannedModel) -> None:
    batch = Batch(rows=1, length=64, labels=10, views=1, stacked=1)
    here = memory(roberta, zero(2, 4), batch, checkpointing=False)
    there = memory(roberta, zero(2, 4, offload_optimizer=True), batch, checkpointing=False)
    own = share(roberta, zero(2, 4))
    assert there.host == {"master weights": 4 * own, "moments": 8 * own, "gradients": 4 * own}
    assert there.total < here.total
    assert not here.host
    regularised = memory(plan_of("roberta-base", "--method", "l2"), zero(2, 4, offload_optimizer=True), batch,
                      checkpointing=False)  # fmt: skip
    assert regularised.host["weight_regularisation"] == 4 * own


def test_a_save_in_the_background_keeps_a_copy_in_the_host(roberta: PlannedModel) -> None:
    """Of weights and moments, fp32, as ``engine.saves`` measures on real ranks."""
    batch = Batch(rows=4, length=64, labels=10, views=1, stacked=1)
    for stage in (0, 2):
        need = memory(roberta, zero(stage, 4), batch, checkpointing=False, async_save=True)
        assert need.host == {"copy for a save": 12 * roberta.trained_parameters // 4}


def test_extras() -> None:
    """By hand: a teacher's copy, 4 bytes of theta0 and 4 of F an entry, query rows where masks are."""
    p, two = 124_697_433, zero(2, 2)
    assert extras(plan_of("roberta-base", "--method", "kd"), two, "none") == {"teacher": 2 * p}
    start_and_fisher = extras(plan_of("roberta-base", "--method", "l2"), two, "none")["weight_regularisation"]
    assert start_and_fisher == pytest.approx(4 * p / 2, rel=1e-5)
    fisher = plan_of("roberta-base", "--method", "ewc", "--general_corpus", "x")
    assert extras(fisher, two, "none")["weight_regularisation"] == 2 * start_and_fisher
    masked = extras(plan_of("roberta-base", "--method", "dga"), two, "update")
    assert masked == {"movement": 4 * 12 * (768 + 1) * 768 // 2}


def test_a_contrast_gathers_both_sides_of_all_ranks() -> None:
    batch = Batch(rows=32, length=128, labels=19, views=4, stacked=4)
    assert gather_bytes(plan_of("roberta-base", "--method", "dga"), batch, 16) == 2 * 16 * 32 * 768 * 4
    assert gather_bytes(plan_of("roberta-base"), batch, 16) == 0


def test_korthikanti() -> None:
    """34 s b h bytes a layer where the FFN is four times the hidden size, without the square of scores."""
    assert layer_activations(plan_of("roberta-base"), 2) == 34 * 768 + 4 * 12


SMALL = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 160, "vocab_size": 100}
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
KINDS: dict[str, dict[str, Any]] = {
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **SMALL},
    "modernbert": {**dict.fromkeys(SPECIAL, 0), **SMALL},
    "llama": {"num_key_value_heads": 2, **SMALL},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_keeps_what_autograd_saves(kind: str, tmp_path: Path) -> None:
    """What one more block adds to the storages that the backward pass keeps, in bf16."""

    query = torch.zeros(1, 2, 8, 16, dtype=torch.bfloat16)
    grouped = query[:, :1] if kind == "llama" else query
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        try:
            scaled_dot_product_attention(query, grouped, grouped, enable_gqa=kind == "llama")
        except RuntimeError:
            pytest.skip("this torch keeps the scores of grouped heads on a CPU")

    def saved(layers: int) -> int:
        config = AutoConfig.for_model(kind, num_hidden_layers=layers, **KINDS[kind])
        auto = AutoModelForCausalLM if kind == "llama" else AutoModelForMaskedLM
        model = auto.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16).train()
        ids = torch.randint(5, 100, (2, 32))
        output, size = saved_bytes(model, lambda: model.base_model(input_ids=ids).last_hidden_state)
        assert output.requires_grad
        return size

    one_more = (saved(4) - saved(2)) / 2
    AutoConfig.for_model(kind, num_hidden_layers=2, **KINDS[kind]).to_json_file(tmp_path / "config.json")
    planned = plan_of(str(tmp_path / "config.json"))
    assert 2 * 32 * layer_activations(planned, 2) == pytest.approx(one_more, rel=0.05)
