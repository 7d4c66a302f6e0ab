"""The Fisher against a loop over examples in plain PyTorch."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.corpus.loading.batches import Batch
from dga_scale.errors import UserError
from dga_scale.preservation.fisher import Fisher, measure_fisher
from dga_scale.preservation.fragments import Fragment
from dga_scale.preservation.weight_regularisation import key_of
from tests.helpers.batches import dense_labels, joined, rows_of, without_labels
from tests.helpers.reference import per_example_fisher
from tests.helpers.toy import toy_batch, toy_lm

ROWS = 6


class Caller(nn.Module):
    """What the Fisher asks of a model: it calls what it is given."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.lm = toy_lm(dropout)
        self.anatomy = anatomy_of(self.lm)

    def forward(self, inputs: Batch, *, compute: Callable[[Batch], Any]) -> Any:
        return compute(inputs)


def fragments_of(model: Caller) -> list[Fragment]:
    return [Fragment(n, 0, tuple(p.shape), p.data.view(-1)) for n, p in model.lm.named_parameters()]


def by_name(fisher: Fisher) -> dict[str, Tensor]:
    return {name: values for (name, _), values in fisher.values.items()}


def expected_fisher(batch: Batch) -> dict[str, Tensor]:
    return {name: f.flatten() for name, f in per_example_fisher(toy_lm(), batch).items()}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(values.max() for values in theirs.values()).item()
    for name, values in theirs.items():
        torch.testing.assert_close(ours[name], values, rtol=1e-4, atol=1e-9 * largest, msg=name)


@pytest.mark.parametrize("size", [1, 2, 6])
def test_it_is_the_mean_of_squares_of_single_examples(size: int) -> None:
    batch, model = toy_batch(ROWS), Caller()
    batches = [rows_of(batch, slice(start, start + size)) for start in range(0, ROWS, size)]
    fisher = measure_fisher(model, batches, fragments_of(model), normalize=False)
    expected = expected_fisher(batch)
    assert_close(by_name(fisher), expected)
    assert fisher.examples == ROWS
    flat = torch.cat(list(expected.values())).double()
    assert fisher.mean == pytest.approx(flat.mean().item(), rel=1e-5)
    assert fisher.zeros == (torch.cat(list(by_name(fisher).values())) == 0).double().mean().item()
    logs = torch.cat(list(by_name(fisher).values()))
    for quantile, value in fisher.log10_quantiles.items():
        assert value == pytest.approx(logs[logs > 0].log10().quantile(quantile).item(), abs=0.05)


def test_squares_of_a_batchs_mean_gradient_would_be_something_else() -> None:
    """The usual mistake, for scale: far from the tolerance above."""
    batch, lm = toy_batch(ROWS), toy_lm().eval()
    logits = lm(input_ids=batch.masked_ids, attention_mask=batch.attention_mask).logits
    F.cross_entropy(logits.flatten(0, 1), dense_labels(batch).flatten()).backward()
    name, squares = next(iter(expected_fisher(batch).items()))
    mistaken = dict(lm.named_parameters())[name].grad.flatten() ** 2
    assert squares.sum() > 2 * mistaken.sum()


def test_normalised_it_has_mean_one_over_the_whole_model() -> None:
    batch, model = toy_batch(ROWS), Caller()
    raw = measure_fisher(model, [batch], fragments_of(model), normalize=False)
    scaled = measure_fisher(model, [batch], fragments_of(model))
    values = torch.cat(list(scaled.values.values()))
    assert values.mean().item() == pytest.approx(1, rel=1e-5)
    for key, own in raw.values.items():
        torch.testing.assert_close(scaled.values[key], own / raw.mean, rtol=1e-6, atol=0)
    for quantile, value in raw.log10_quantiles.items():
        assert scaled.log10_quantiles[quantile] == pytest.approx(value - math.log10(raw.mean))


def test_dropout_is_off_and_the_model_is_left_as_it_was() -> None:
    batch, model = toy_batch(ROWS), Caller(dropout=0.3).train()
    frozen = model.lm.bert.embeddings.word_embeddings.weight
    frozen.requires_grad_(False)
    fragments = [f for f in fragments_of(model) if "word_embeddings" not in f.name]
    fisher = by_name(measure_fisher(model, [batch], fragments, normalize=False))
    assert model.training
    assert model.lm.bert.encoder.layer[0].output.dropout.training
    assert all(p.grad is None for p in model.parameters())
    expected = expected_fisher(batch)
    assert_close(fisher, {name: expected[name] for name in fisher})
    assert not any("word_embeddings" in name for name in fisher)


def test_rows_that_fill_up_and_pieces_of_parameters() -> None:
    batch, model = toy_batch(ROWS), Caller()
    filled = without_labels(joined([batch, rows_of(batch, [0, 1])]), slice(ROWS, None))
    halves = []
    for fragment in fragments_of(model):
        middle = len(fragment.values) // 3
        halves.append(Fragment(fragment.name, middle, fragment.shape, fragment.values[middle:]))
    fisher = measure_fisher(model, [filled], halves, normalize=False)
    assert fisher.examples == ROWS
    expected = expected_fisher(batch)
    for fragment in halves:
        torch.testing.assert_close(
            fisher.values[key_of(fragment)], expected[fragment.name][fragment.start :], rtol=1e-4, atol=1e-10
        )


def test_no_examples() -> None:
    batch, model = toy_batch(ROWS), Caller()
    batch.labels[:] = -100
    with pytest.raises(UserError, match="measured on no example"):
        measure_fisher(model, [batch], fragments_of(model))


def test_a_model_that_is_not_finite() -> None:
    batch, model = toy_batch(ROWS), Caller()
    next(model.lm.parameters()).data[:] = math.nan
    with pytest.raises(UserError, match="has mean nan: its gradients are NaN"):
        measure_fisher(model, [batch], fragments_of(model))
