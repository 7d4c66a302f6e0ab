"""Importance against gate gradients taken one example at a time on the stock model, and its invariances."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import BertForMaskedLM

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.config.methods.dga import DGASettings
from dga_scale.corpus.loading.batches import Batch
from dga_scale.corpus.loading.masking import IGNORED
from dga_scale.errors import UserError
from dga_scale.objectives.methods.dga import DGA
from dga_scale.objectives.training_model import TrainingModel, evaluate_rows
from dga_scale.preservation.importance import Importance, measure_importance
from tests.helpers.batches import batch_of, dense_labels, joined, masked_places, rows_of, without_labels
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_models import TINY
from tests.helpers.toy import (
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    LAYERS,
    toy_batch,
    toy_lm,
    toy_model,
)

KINDS = ("heads", "ffn_intermediate", "ffn_output")


def split(batch: Batch, size: int) -> list[Batch]:
    return [rows_of(batch, slice(start, start + size)) for start in range(0, len(batch.input_ids), size)]


def gated_by_hand(lm: BertForMaskedLM, gates: dict[str, Tensor]) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that multiply each unit's output by its gate (layers, units), one gate for the whole batch."""

    def scale_input(gate: Tensor) -> Callable[..., tuple[Tensor, ...]]:
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            width = inputs[0].shape[-1] // len(gate)
            return (inputs[0] * gate.repeat_interleave(width), *inputs[1:])

        return hook

    handles = []
    for number, layer in enumerate(lm.bert.encoder.layer):
        handles += [
            layer.attention.output.dense.register_forward_pre_hook(scale_input(gates["heads"][number])),
            layer.output.dense.register_forward_pre_hook(scale_input(gates["ffn_intermediate"][number])),
            layer.output.dense.register_forward_hook(
                lambda module, inputs, output, gate=gates["ffn_output"][number]: output * gate
            ),
        ]
    return handles


def one_by_one(batch: Batch) -> dict[str, Tensor]:
    """|d L_MLM(x) / d gate| of each example, (B, layers, units): one at a time, on the stock model."""
    lm = toy_lm()
    units = {"heads": HEADS, "ffn_intermediate": INTERMEDIATE, "ffn_output": HIDDEN}
    found: dict[str, list[Tensor]] = {kind: [] for kind in units}
    for row in range(len(batch.input_ids)):
        gates = {kind: torch.ones(LAYERS, count, requires_grad=True) for kind, count in units.items()}
        handles = gated_by_hand(lm, gates)
        one = rows_of(batch, slice(row, row + 1))
        length = int(one.attention_mask.sum())
        logits = lm(input_ids=one.masked_ids[:, :length]).logits[0]
        loss = F.cross_entropy(logits, dense_labels(one)[0, :length])
        for kind, gradient in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
            found[kind].append(gradient.abs())
        for handle in handles:
            handle.remove()
    return {kind: torch.stack(rows) for kind, rows in found.items()}


def test_importance_is_the_mean_of_per_example_gate_gradients() -> None:
    """All three kinds of unit at once; examples of different lengths and numbers of labels."""
    batch = toy_batch()
    measured = measure_importance(toy_model("das"), [batch], kinds=KINDS, loss="mlm")
    for kind, rows in one_by_one(batch).items():
        torch.testing.assert_close(measured.values[kind], rows.mean(dim=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("squash", ["clip", "abs", "minmax"])
def test_standard_errors_are_those_of_the_rows(squash: str) -> None:
    """Of fewer rows than groups: s / sqrt(n) of the mean, and of ``a`` what leaving out each row changes."""
    batch = toy_batch()
    measured = measure_importance(toy_model("das"), split(batch, 3), kinds=KINDS, loss="mlm")
    errors = measured.standard_errors(squash)
    for kind, rows in one_by_one(batch).items():
        n, values = len(rows), rows.double().numpy()
        error, error_of_a = (tensor.numpy() for tensor in errors[kind])
        np.testing.assert_allclose(error, values.std(axis=0, ddof=1) / math.sqrt(n), rtol=1e-3, atol=1e-7)
        z = [scipy.stats.zscore(np.delete(values, row, axis=0).mean(axis=0), axis=1) for row in range(n)]
        a = np.tanh(np.stack(z))
        if squash == "clip":
            a = np.maximum(a, 0)
        elif squash == "abs":
            a = np.abs(a)
        else:
            a = (a - a.min(axis=2, keepdims=True)) / np.ptp(a, axis=2, keepdims=True)
        expected = np.sqrt((n - 1) / n * ((a - a.mean(axis=0)) ** 2).sum(axis=0))
        np.testing.assert_allclose(error_of_a, expected, rtol=1e-2, atol=1e-4)


def test_standard_errors_are_the_spread_of_other_draws() -> None:
    """128 rows in 32 groups of four, 24 draws: what each says of itself is how far they lie apart.

    The spread of 24 draws is sure to 1 / sqrt(2 * 23) = 15%, that of four independent units to 7%: the bounds
    are three times that.
    """
    model = toy_model()
    draws = [
        measure_importance(model, [toy_batch(128, seed=1000 + draw)], kinds=("heads",), loss="mlm")
        for draw in range(24)
    ]
    values = torch.stack([draw.values["heads"] for draw in draws])
    a = torch.stack([draw.protection("minmax")["heads"] for draw in draws])
    for number, drawn in enumerate((values, a)):
        said = torch.stack([draw.standard_errors("minmax")["heads"][number] for draw in draws])
        ratio = (said.square().mean() / drawn.var(dim=0).mean()).sqrt().item()
        assert 0.8 < ratio < 1.25


def test_one_example_or_an_older_file_says_nothing_of_its_errors(tmp_path: Path) -> None:
    alone = measure_importance(toy_model(), [toy_batch(1)], loss="mlm")
    assert alone.standard_errors() == {}
    alone.save(tmp_path / "older.safetensors")
    assert Importance.load(tmp_path / "older.safetensors").standard_errors() == {}


def measured_on_ranks(size: int, reverse: bool) -> tuple[Tensor, ...]:
    """On each rank: importance of its share of 16 rows in batches of ``size``."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if ranks > 1 else 0
    own = rows_of(toy_batch(16), slice(rank * 16 // ranks, (rank + 1) * 16 // ranks))
    batches = split(own, size)

    def summed(tensor: Tensor) -> Tensor:
        if ranks > 1:
            dist.all_reduce(tensor)
        return tensor

    measured = measure_importance(
        toy_model(), batches[::-1] if reverse else batches, loss="mlm", reduce=summed
    )
    return measured.values["heads"], *measured.standard_errors()["heads"]


@pytest.mark.parametrize(("ranks", "size", "reverse"), [(2, 4, False), (2, 1, True), (4, 2, False)])
def test_importance_is_the_same_on_any_number_of_ranks(ranks: int, size: int, reverse: bool) -> None:
    expected, *errors = measured_on_ranks(16, False)
    for values, *own_errors in run_ranks(ranks, measured_on_ranks, size, reverse):
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(own_errors, errors, rtol=1e-3, atol=1e-5)


def test_examples_without_labels_do_not_count() -> None:
    """Rows that fill up the last batch, here even without a token to attend to."""
    batch = toy_batch()
    expected = measure_importance(toy_model(), [batch], loss="mlm")
    padded = without_labels(joined([batch, rows_of(batch, [0, 1])]), slice(-2, None))
    padded.attention_mask[-2:] = 0
    measured = measure_importance(toy_model(), split(padded, 5), loss="mlm")
    torch.testing.assert_close(measured.values["heads"], expected.values["heads"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(measured.left_out["heads"], expected.left_out["heads"], rtol=1e-5, atol=1e-7)
    assert measured.settings["examples"] == 8


@pytest.mark.parametrize("distribution", ["vocabulary", "hidden", "sequence"])
def test_rows_that_fill_up_a_batch_do_not_count_for_proxy_kl(distribution: str) -> None:
    """They are repeated rows without labels. From one seed, each of two rows alone averages to both."""
    both = toy_batch(2)

    def measured(batch: Batch) -> Tensor:
        torch.manual_seed(7)
        model = toy_model(dropout=0.1)
        return measure_importance(model, [batch], distribution=distribution).values["heads"]

    alone = [measured(without_labels(both, filler)) for filler in (0, 1)]
    torch.testing.assert_close(measured(both), (alone[0] + alone[1]) / 2, rtol=1e-5, atol=1e-7)


def proxy_kl_by_hand(model: TrainingModel, batch: Batch, distribution: str) -> Tensor:
    """|d KL(f1 || f2) / d gate| of one example, (layers, heads), from the probabilities as written."""
    gates = torch.ones(LAYERS, HEADS, requires_grad=True)
    ones = {"ffn_intermediate": torch.ones(LAYERS, INTERMEDIATE), "ffn_output": torch.ones(LAYERS, HIDDEN)}
    lm = model.lm
    handles = gated_by_hand(lm, {"heads": gates, **ones})
    length = int(batch.attention_mask.sum())
    # The doubled batch in one forward draws the same dropout as the code under test does from this seed.
    output = lm.bert(batch.input_ids.repeat(2, 1), attention_mask=batch.attention_mask.repeat(2, 1))
    hidden = output.last_hidden_state
    if distribution == "vocabulary":
        p = lm.cls(hidden)[:, masked_places(batch)[0]].softmax(dim=-1)  # (2, labels, V)
    elif distribution == "hidden":
        p = hidden[:, :length].softmax(dim=-1)  # (2, T, H)
    else:
        p = hidden[:, :length].softmax(dim=1).transpose(1, 2)  # (2, H, T)
    divergence = (p[0] * (p[0] / p[1]).log()).sum(dim=-1).mean()
    (gradient,) = torch.autograd.grad(divergence, gates)
    for handle in handles:
        handle.remove()
    return gradient.abs()


@pytest.mark.parametrize("distribution", ["vocabulary", "hidden", "sequence"])
def test_proxy_kl_compares_two_dropout_draws(distribution: str) -> None:
    """One padded example, so that both sides draw the same dropout from one seed."""
    batch = next(b for b in split(toy_batch(), 1) if 0 in b.attention_mask)
    torch.manual_seed(7)
    measured = measure_importance(toy_model(dropout=0.1), [batch], distribution=distribution)
    torch.manual_seed(7)
    expected = proxy_kl_by_hand(toy_model(dropout=0.1), batch, distribution)
    torch.testing.assert_close(measured.values["heads"], expected, rtol=1e-3, atol=1e-6)


def test_two_seeds_on_disjoint_text_agree_on_what_matters() -> None:
    """Proxy KL is noisy, an example at a time; its mean is a property of the model."""

    def measured(seed: int) -> Tensor:
        model = toy_model(dropout=0.1)
        torch.manual_seed(seed)
        batches = [toy_batch(32, seed=100 * seed + number) for number in range(6)]
        return measure_importance(model, batches).values["heads"]

    first, second = measured(1), measured(2)
    assert scipy.stats.spearmanr(first.flatten(), second.flatten()).statistic > 0.5


def test_parameters_and_gradients_are_left_as_they_were() -> None:
    model = toy_model(dropout=0.1)
    model.lm.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0) if parameter.requires_grad else None
    measure_importance(model, [toy_batch()])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"lm.bert.embeddings.word_embeddings.weight"}
    assert all(bool((p.grad == 2).all()) for p in model.parameters() if p.requires_grad)
    evaluate_rows(model, toy_batch(3))  # gates left behind would be those of 8 rows


def test_no_dropout_is_refused_with_what_to_pass() -> None:
    with pytest.raises(UserError, match=r"--dropout 0\.1"):
        measure_importance(toy_model(dropout=0.0), [toy_batch()])


def test_eval_mode_is_refused_for_proxy_kl_only() -> None:
    model = toy_model(dropout=0.1).eval()
    with pytest.raises(ValueError, match="train"):
        measure_importance(model, [toy_batch()])
    assert measure_importance(model, [toy_batch()], loss="mlm").values["heads"].gt(0).all()
    model.train()
    model.lm.eval()  # as from_pretrained leaves it, inside a module that says it is in train mode
    with pytest.raises(ValueError, match="train"):
        measure_importance(model, [toy_batch()])


def test_unusable_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="proxy"):
        measure_importance(toy_model(), [toy_batch()], loss="kl")
    with pytest.raises(ValueError, match="vocabulary"):
        measure_importance(toy_model(), [toy_batch()], distribution="tokens")
    empty = toy_batch()
    empty.labels[:] = IGNORED
    with pytest.raises(UserError, match="no example"):
        measure_importance(toy_model(), [empty], loss="mlm")
    with pytest.raises(UserError, match="no example"):
        measure_importance(toy_model(), [], loss="mlm")


def test_a_model_with_nan_weights_is_refused_naming_the_layer() -> None:
    model = toy_model(dropout=0.1)
    torch.nn.init.constant_(model.lm.bert.encoder.layer[1].output.dense.weight, float("inf"))
    with pytest.raises(UserError, match=r"heads in layer 0, 1 is NaN or infinite"):
        measure_importance(model, [toy_batch()], loss="mlm")


def test_causal_models_and_fp16_are_measured() -> None:
    lm = TINY["llama"].model()
    model = TrainingModel(lm, anatomy_of(lm), DGA(DGASettings()))
    ids = torch.randint(3, 90, (4, 9))
    labels = torch.full_like(ids, IGNORED)
    labels[:, :-1] = ids[:, 1:]
    batch = batch_of(ids, ids, torch.ones_like(ids), labels)
    exact = measure_importance(model, [batch], loss="mlm").values["heads"]
    assert bool((exact > 0).all())
    model.to(torch.bfloat16)
    torch.testing.assert_close(
        measure_importance(model, [batch], loss="mlm").values["heads"], exact, rtol=0.1, atol=1e-3
    )


VALUES = torch.tensor([[1.0, 2.0, 3.0, 6.0], [4.0, 4.0, 4.0, 0.0]])


def test_protection_is_tanh_of_the_z_score_squashed_as_named() -> None:
    importance = Importance({"heads": VALUES}, {})
    z = [
        [(x - 3.0) / math.sqrt(3.5) for x in (1, 2, 3, 6)],
        [(x - 3.0) / math.sqrt(3.0) for x in (4, 4, 4, 0)],
    ]
    squashed = torch.tensor([[math.tanh(value) for value in row] for row in z])
    torch.testing.assert_close(importance.protection()["heads"], squashed.clamp(min=0))
    torch.testing.assert_close(importance.protection("clip")["heads"], squashed.clamp(min=0))
    torch.testing.assert_close(importance.protection("abs")["heads"], squashed.abs())
    low, high = squashed.amin(1, keepdim=True), squashed.amax(1, keepdim=True)
    torch.testing.assert_close(importance.protection("minmax")["heads"], (squashed - low) / (high - low))
    with pytest.raises(ValueError, match="clip, abs, minmax"):
        importance.protection("relu")


@pytest.mark.parametrize("row", [[0.0] * 4, [0.3] * 4, [0.3, 0.3, 0.3 * (1 + 1e-7), 0.3]])
def test_a_layer_without_spread_is_refused_by_number(row: list[float]) -> None:
    values = VALUES.clone()
    values[1] = torch.tensor(row)
    with pytest.raises(UserError, match="heads in layer 1 has no spread"):
        Importance({"heads": values}, {}).protection()


def test_an_infinite_importance_is_refused_by_layer() -> None:
    for bad in (float("nan"), float("inf")):
        values = VALUES.clone()
        values[0, 2] = bad
        with pytest.raises(UserError, match="layer 0 is NaN"):
            Importance({"heads": values}, {}).protection()


def test_importance_is_saved_with_its_settings(tmp_path: Path) -> None:
    settings = {"model": "some/model", "corpus": "abc", "samples": 8}
    measured = measure_importance(toy_model("das"), [toy_batch()], kinds=KINDS, loss="mlm", settings=settings)
    assert measured.settings == settings | {"loss": "mlm", "examples": 8, "kinds": list(KINDS)}
    path = tmp_path / "importance.safetensors"
    measured.save(path)
    loaded = Importance.load(path)
    assert loaded.settings == measured.settings
    assert loaded.values.keys() == measured.values.keys()
    for kind, values in measured.values.items():
        assert torch.equal(loaded.values[kind], values)
        assert torch.equal(loaded.left_out[kind], measured.left_out[kind])
    assert Importance.load(path, ["heads"]).left_out.keys() == {"heads"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["importance.safetensors"]


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    path = tmp_path / "importance.safetensors"
    Importance({"heads": VALUES}, {}).save(path)
    return path


def test_a_damaged_file_is_a_users_error(damaged: Path) -> None:
    content = damaged.read_bytes()
    for wrong in (content[:-5], b"", b"{}" + content):
        damaged.write_bytes(wrong)
        with pytest.raises(UserError, match="can't be read as importances"):
            Importance.load(damaged)
    with pytest.raises(UserError, match="can't be read as importances"):
        Importance.load(damaged.with_name("absent"))


def test_only_the_kinds_asked_for_are_read_and_missing_ones_are_named(tmp_path: Path) -> None:
    path = tmp_path / "importance.safetensors"
    Importance({"ffn_output": VALUES, "heads": VALUES + 1}, {}).save(path)
    assert Importance.load(path, ["heads"]).values.keys() == {"heads"}
    assert torch.equal(Importance.load(path, ["heads"]).values["heads"], VALUES + 1)
    assert list(Importance.load(path, ["heads", "ffn_output"]).values) == ["heads", "ffn_output"]
    with pytest.raises(
        UserError, match=r"importance of ffn_output, heads, not of ffn_intermediate.*--protect"
    ):
        Importance.load(path, ["heads", "ffn_intermediate"])
