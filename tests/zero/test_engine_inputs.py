"""What the training model's forward is given under DeepSpeed: the batch as it is, nothing copied or cast."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.corpus.loading.batches import Batch, Counts
from dga_scale.objectives.training_model import TrainingModel
from dga_scale.zero.engine import build_engine
from dga_scale.zero.optimizer_hooks import backward
from tests.helpers.batches import batch_of, dense_labels, rows_of
from tests.helpers.comparison import method_of
from tests.helpers.ranks import run_ranks
from tests.helpers.toy import toy_batch, toy_lm
from tests.helpers.training import Setup

ROWS, RANKS = 8, 2
SETUPS = [Setup(stage, precision, clipping=0.0) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]


class Watched(TrainingModel):
    """Keeps what its forward was called with."""

    def forward(self, inputs: Any, counts: Any = None, **others: Any) -> Any:
        self.seen = inputs, counts
        return super().forward(inputs, counts, **others)


def own_part() -> Batch:
    """This rank's rows, of two corpora, each row in a packed row of its own: no field is left out."""
    batch = rows_of(toy_batch(ROWS), slice(dist.get_rank(), None, RANKS))
    rows, tokens = batch.input_ids.shape
    positions = torch.arange(rows * tokens).view(rows, tokens)
    return batch_of(
        batch.input_ids,
        batch.masked_ids,
        batch.attention_mask,
        dense_labels(batch),
        sources=torch.arange(rows) % 2,
        packed_positions=positions.masked_fill(batch.attention_mask == 0, -1),
    )


def changes(setups: Sequence[Setup]) -> list[list[str]]:
    """By setup, what is another at the forward than it was at the engine; after it, the engine steps."""
    given, counts, found = own_part(), Counts((9, 8), num_micro_batches=RANKS), []
    for setup in setups:
        lm = toy_lm()
        model = Watched(lm, anatomy_of(lm), method_of("kd"), teacher=toy_lm(seed=1)).train()
        model.enable_gradient_checkpointing()
        engine = build_engine(model, setup.resolved(RANKS))
        backward(engine, engine(given, counts)[0])
        engine.step()
        inputs, seen_counts = model.seen
        changed = [] if type(inputs) is Batch else [f"a {type(inputs)}"]
        changed += [] if type(seen_counts) is Counts and seen_counts == counts else [f"{seen_counts}"]
        changed += [name for name in Batch._fields if not same(getattr(inputs, name), getattr(given, name))]
        found.append(changed)
        engine.destroy()
    return found


def same(ours: Any, given: Any) -> bool:
    """Whether this is what was given, or a view of all of its memory (ZeRO-3's hooks detach every tensor)."""
    if not isinstance(given, Tensor):
        return ours is given
    like = (ours.dtype, ours.shape, ours.stride()) == (given.dtype, given.shape, given.stride())
    return like and ours.data_ptr() == given.data_ptr()


def test_a_batch_arrives_as_it_was_given_in_every_stage() -> None:
    for rank, found in enumerate(run_ranks(RANKS, changes, SETUPS)):
        assert dict(zip(map(str, SETUPS), found, strict=True)) == {str(setup): [] for setup in SETUPS}, rank


@pytest.mark.parametrize("field", [field for field in Batch._fields if field != "padded"])
def test_the_comparison_sees_a_copy(field: str) -> None:
    given = toy_batch(2)._replace(packed_positions=torch.arange(24).view(2, 12))
    tensor = getattr(given, field)
    assert same(tensor.detach(), tensor)
    assert not same(tensor.clone(), tensor)
    assert not same(tensor.float(), tensor)
