"""Sorted rows read in groups, each as long as its longest row, against the same rows in one padded pass."""

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.backbone.row_groups import joined, last_hidden_states, row_groups
from dga_scale.corpus.batches import Batch
from dga_scale.engine.deepspeed import build_engine, set_learning_rate
from dga_scale.engine.optimizer_step import backward
from dga_scale.objectives.training_model import TrainingModel, evaluate_rows
from tests.backbone.tiny import TINY
from tests.batches import batch_of, dense_labels, rows_of
from tests.engine.training import Setup, full_weights
from tests.objectives.comparison import (
    assert_same_gradients,
    gradients_of,
    labels_in,
    loss_of,
    method_of,
    training_model,
)
from tests.objectives.toy import tensors_of, toy_batch, toy_lm, toy_model, toy_protection
from tests.ranks import run_ranks
from tests.reference import Reference

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


def in_groups(batch: Batch, groups: int) -> Batch:
    """The same rows, each group cut to the even number of tokens that its longest row needs."""
    lengths = batch.attention_mask.sum(dim=1)
    widths = tuple(int(own.max() + own.max() % 2) for own in lengths.chunk(groups))
    cut = slice(0, max(widths))
    return batch_of(
        batch.input_ids[:, cut],
        batch.masked_ids[:, cut],
        batch.attention_mask[:, cut],
        dense_labels(batch)[:, cut],
        sources=batch.sources,
        widths=widths,
    )


def compare(model: TrainingModel, groups: int = 4) -> None:
    """Loss, its terms and all gradients of the rows in groups are those of the padded rows."""
    padded, parts = by_length(), in_groups(by_length(), groups)
    assert len(set(parts.widths)) > 1
    assert max(parts.widths) < TOKENS
    found = []
    for batch in (padded, parts):
        model.zero_grad()
        labels = [int((dense_labels(batch)[batch.sources == source] != -100).sum()) for source in range(3)]
        torch.manual_seed(0)
        loss, terms = model(*tensors_of(batch), masked=labels)
        loss.backward()
        found.append(({"loss": loss.item(), **{k: v.item() for k, v in terms.items()}}, gradients_of(model)))
        found[-1] = (found[-1][0], {name: g.clone() for name, g in found[-1][1].items()})
    (expected, expected_gradients), (ours, gradients) = found
    assert ours == pytest.approx(expected, rel=1e-5)
    assert_same_gradients(gradients, expected_gradients)


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_reads_groups_as_it_reads_padded_rows(name: str) -> None:
    lm = TINY[name].model()
    method = method_of("dga")
    model = TrainingModel(lm, anatomy_of(lm), method)  # in eval mode: no dropout
    model.set_protection({"heads": toy_protection()})
    compare(model)


@pytest.mark.parametrize("name", ["kd", "kl", "tacl", "infoword", "simcse", "adapted_deit", "rehearsal"])
def test_every_method_finds_what_it_reads(name: str) -> None:
    compare(training_model(name, prepared=name != "simcse"))  # which asks for dropout


@pytest.mark.parametrize("name", ["adapter", "prompt", "lora"])
def test_models_with_something_added(name: str) -> None:
    own = {"prompt_tokens": 3} if name == "prompt" else {}
    compare(training_model(name, **own))


@pytest.mark.parametrize(("split", "checkpointing"), [(True, False), (False, True)])
def test_split_views_and_activation_checkpointing(split: bool, checkpointing: bool) -> None:
    model = toy_model("dga", split_views=split)
    model.set_protection({"heads": toy_protection()})
    if checkpointing:
        model.enable_gradient_checkpointing()
    compare(model, groups=2)


def test_checkpointing_repeats_the_gates_and_the_dropout_of_each_group() -> None:
    found = []
    for checkpointing in (False, True):
        model = toy_model("dga", dropout=0.1)
        model.set_protection({"heads": toy_protection()})
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(1)
        loss, _ = loss_of(model, in_groups(by_length(), 4), labels=10)
        loss.backward()
        found.append((loss.item(), gradients_of(model.lm)))
    assert found[0][0] == found[1][0]
    assert_same_gradients(found[1][1], found[0][1])


def test_evaluation_and_the_parts_of_a_batch() -> None:
    batch, model = by_length(), toy_model("mlm")
    parts = in_groups(batch, 4)
    torch.testing.assert_close(evaluate_rows(model, parts), evaluate_rows(model, batch), rtol=1e-5, atol=1e-6)
    hidden = last_hidden_states(model.lm.bert, parts.input_ids, parts.attention_mask, parts.widths)
    for rows, width in row_groups(parts.attention_mask, parts.widths):
        assert hidden[rows, :width].any(dim=-1).all()
        assert not hidden[rows, width:].any()
    one = torch.ones(2, 3, 4)
    assert joined([one], 3) is one  # nothing to pad, nothing copied


def trained(stages: Sequence[int]) -> list[dict[str, Tensor]]:
    """Two DGA steps; sorted rows are dealt out to the ranks, whose groups have lengths of their own."""
    found, ranks = [], dist.get_world_size()
    own = in_groups(rows_of(by_length(), slice(dist.get_rank(), None, ranks)), 2)
    for stage in stages:
        model = toy_model("dga")
        engine = build_engine(model, Setup(stage, clipping=0.0, epsilon=1e-2).resolved(ranks))
        model.set_protection({"heads": toy_protection()})
        set_learning_rate(engine, 1e-2)
        for _ in range(2):
            loss, _ = engine(*tensors_of(own), masked=(labels_in(by_length()),), passes=float(ranks))
            backward(engine, loss)
            engine.step()
        found.append(full_weights(engine))
        engine.destroy()
    return found


def test_two_ranks_train_dga_as_one_process_does_on_padded_rows() -> None:
    """ZeRO-3 gathers with each of the trunk's passes: as many on every rank, whatever their lengths."""
    reference = Reference(toy_lm(), protection=toy_protection(), learning_rate=1e-2, eps=1e-2)
    for _ in range(2):
        reference.step(by_length())
    stages = (2, 3)
    for weights in run_ranks(2, trained, stages):
        for stage, own in zip(stages, weights, strict=True):
            for name, expected in reference.weights.items():
                torch.testing.assert_close(own[name], expected, rtol=0, atol=2e-5, msg=f"{stage}: {name}")
