"""Documents packed into fewer rows, against the same rows padded."""

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.backbone.cpu_kernels import use_cpu_kernels
from dga_scale.backbone.packed_rows import can_pack, last_hidden_states
from dga_scale.corpus.loading.batches import Batch, Counts
from dga_scale.corpus.loading.shapes import pack_positions
from dga_scale.objectives.training_model import TrainingModel, evaluate_rows
from dga_scale.zero.engine import build_engine, set_learning_rate
from dga_scale.zero.optimizer_hooks import backward
from tests.helpers.batches import batch_of, dense_labels, rows_of
from tests.helpers.comparison import (
    assert_same_gradients,
    counts_of,
    gradients_of,
    loss_of,
    method_of,
    training_model,
)
from tests.helpers.ranks import run_ranks
from tests.helpers.reference import Reference
from tests.helpers.tiny_models import TINY
from tests.helpers.toy import toy_batch, toy_lm, toy_model, toy_protection
from tests.helpers.training import Setup, full_weights

ROWS, TOKENS = 8, 20


def by_length() -> Batch:
    """Rows of 6 to 18 tokens, the longest first, two of them of other corpora; all padded to 20."""
    batch = toy_batch(ROWS, TOKENS, seed=3)
    lengths = batch.attention_mask.sum(dim=1).clamp(max=TOKENS - 2)
    batch.attention_mask[:, -2:] = 0
    sorted_rows = rows_of(batch, torch.argsort(-lengths, stable=True))
    labels = dense_labels(sorted_rows).masked_fill(sorted_rows.attention_mask == 0, -100)
    return batch_of(
        sorted_rows.input_ids,
        sorted_rows.masked_ids,
        sorted_rows.attention_mask,
        labels,
        sources=torch.tensor([0, 1, 0, 0, 0, 2, 0, 0]),
    )


def packed_batch(batch: Batch) -> Batch:
    """The same rows cut to the longest, and packed."""
    lengths = batch.attention_mask.sum(dim=1).tolist()
    cut = slice(0, max(lengths))
    positions = torch.from_numpy(pack_positions(lengths, max(lengths)))
    # One more packed row that nothing stands in, as rounding their number up makes.
    return batch_of(
        batch.input_ids[:, cut],
        batch.masked_ids[:, cut],
        batch.attention_mask[:, cut],
        dense_labels(batch)[:, cut],
        sources=batch.sources,
        packed_positions=F.pad(positions, (0, 0, 0, 1), value=-1),
    )


def compare(model: TrainingModel) -> None:
    """Loss, its terms and all gradients of the packed rows are those of the padded rows."""
    padded, packed = by_length(), packed_batch(by_length())
    assert packed.packed_positions is not None
    assert len(packed.packed_positions) < ROWS
    found = []
    for batch in (padded, packed):
        model.zero_grad()
        torch.manual_seed(0)
        loss, terms = model(batch, counts_of(batch, sources=3))
        loss.backward()
        found.append(({"loss": loss.item(), **{k: v.item() for k, v in terms.items()}}, gradients_of(model)))
        found[-1] = (found[-1][0], {name: g.clone() for name, g in found[-1][1].items()})
    (expected, expected_gradients), (ours, gradients) = found
    assert ours == pytest.approx(expected, rel=1e-5)
    assert_same_gradients(gradients, expected_gradients)


def dga_of(lm: PreTrainedModel) -> TrainingModel:
    model = TrainingModel(lm, anatomy_of(lm), method_of("dga"))  # in eval mode: no dropout
    model.protection.set({"heads": toy_protection()})
    return model


UNPACKED = ("deberta-v2", "bloom")


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        (name, attention)
        for name, tiny in TINY.items()
        for attention in ("eager", "sdpa")
        if tiny.model_type not in UNPACKED and (tiny.sdpa or attention == "eager")
    ],
)
def test_every_architecture_reads_packed_rows_as_it_reads_padded_ones(name: str, attention: str) -> None:
    lm = TINY[name].model(attn_implementation=attention)
    assert can_pack(lm, anatomy_of(lm))
    compare(dga_of(lm))


WINDOWS = {
    "mistral": {"sliding_window": 4},
    "phi3": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "modernbert": {"local_attention": 6},
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_of_attention_shorter_than_the_rows(name: str) -> None:
    compare(dga_of(TINY[name].model(attn_implementation="sdpa", **WINDOWS[name])))


def test_the_cpus_own_attention() -> None:
    """In bf16, which it is for: states of about 1, rounded to 1/256 in each of a few operations."""
    lm = TINY["roberta"].model(attn_implementation="sdpa").bfloat16()
    use_cpu_kernels(lm)
    anatomy = anatomy_of(lm)
    assert can_pack(lm, anatomy)
    padded, packed = by_length(), packed_batch(by_length())
    found = [
        last_hidden_states(lm.roberta, anatomy, b.input_ids, b.attention_mask, b.packed_positions)
        for b in (padded, packed)
    ]
    real = packed.attention_mask == 1
    expected, ours = found[0][:, : real.shape[1]][real], found[1][real]
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.06)


def test_what_can_not_be_packed() -> None:
    for name in UNPACKED:
        lm = TINY[name].model()
        assert not can_pack(lm, anatomy_of(lm))
    prompt = training_model("prompt", prompt_tokens=3)
    assert not can_pack(prompt.lm, prompt.anatomy)
    bert = TINY["bert"].model()
    assert can_pack(bert, anatomy_of(bert))
    bert.config._attn_implementation = "flash_attention_2"
    assert not can_pack(bert, anatomy_of(bert))


@pytest.mark.parametrize("name", ["kd", "kl", "tacl", "infoword", "simcse", "adapted_deit", "rehearsal"])
def test_every_method_finds_what_it_reads(name: str) -> None:
    compare(training_model(name, prepared=name != "simcse"))  # which asks for dropout


@pytest.mark.parametrize("name", ["adapter", "lora"])
def test_models_with_something_added(name: str) -> None:
    compare(training_model(name))


@pytest.mark.parametrize(("split", "checkpointing"), [(True, False), (False, True)])
def test_split_views_and_activation_checkpointing(split: bool, checkpointing: bool) -> None:
    model = toy_model("dga", split_views=split)
    model.protection.set({"heads": toy_protection()})
    if checkpointing:
        model.enable_gradient_checkpointing()
    compare(model)


def test_checkpointing_repeats_the_gates_and_the_dropout_of_packed_rows() -> None:
    found = []
    for checkpointing in (False, True):
        model = toy_model("dga", dropout=0.1)
        model.protection.set({"heads": toy_protection()})
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(1)
        loss, _ = loss_of(model, packed_batch(by_length()), Counts((10,), 1))
        loss.backward()
        found.append((loss.item(), gradients_of(model.lm)))
    assert found[0][0] == found[1][0]
    assert_same_gradients(found[1][1], found[0][1])


def test_evaluation_and_the_states_of_padding() -> None:
    batch, model = by_length(), toy_model("mlm")
    packed = packed_batch(batch)
    ours, expected = evaluate_rows(model, packed), evaluate_rows(model, batch)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    hidden = last_hidden_states(
        model.lm.bert, model.anatomy, packed.input_ids, packed.attention_mask, packed.packed_positions
    )
    assert hidden[packed.attention_mask == 1].any(dim=-1).all()
    assert not hidden[packed.attention_mask == 0].any()


def test_a_full_batch_needs_no_attention_mask() -> None:
    full = toy_batch(4, 6, seed=1)
    assert not full.padded
    assert full.key_mask is None
    model = toy_model("mlm")
    found = [loss_of(model, full._replace(padded=padded))[0].item() for padded in (True, False)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def trained(stages: Sequence[int]) -> list[dict[str, Tensor]]:
    """Two DGA steps; sorted rows are assigned to the ranks, each of which packs its own."""
    found, ranks = [], dist.get_world_size()
    own = packed_batch(rows_of(by_length(), slice(dist.get_rank(), None, ranks)))
    for stage in stages:
        model = toy_model("dga")
        engine = build_engine(model, Setup(stage, clipping=0.0, epsilon=1e-2).resolved(ranks))
        model.protection.set({"heads": toy_protection()})
        set_learning_rate(engine, 1e-2)
        for _ in range(2):
            loss, _ = engine(own, counts_of(by_length(), num_micro_batches=ranks))
            backward(engine, loss)
            engine.step()
        found.append(full_weights(engine))
        engine.destroy()
    return found


def test_two_ranks_train_dga_as_one_process_does_on_padded_rows() -> None:
    reference = Reference(toy_lm(), protection=toy_protection(), learning_rate=1e-2, eps=1e-2)
    for _ in range(2):
        reference.step(by_length())
    stages = (2, 3)
    for weights in run_ranks(2, trained, stages):
        for stage, own in zip(stages, weights, strict=True):
            for name, expected in reference.weights.items():
                torch.testing.assert_close(own[name], expected, rtol=0, atol=2e-5, msg=f"{stage}: {name}")
