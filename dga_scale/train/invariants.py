"""Run-time invariants (``--check_invariants N``): the state that ranks have in common is compared in a run.

Before the first step and every N steps:

- equal on all ranks: whatever they hold whole (weights and buffers, experts' centres among them; in ZeRO-0
  masters and moments too), protection, soft-mask factors, learning rates, counts of steps, loss scale;
- complete over the ranks, nothing twice: the entries that optimizers step, and those of frozen weights;
- on each rank: the weights of the forward passes are its masters, rounded; dropout has the planned seed;
- the rows that all ranks used since the last check are those of ``SampleOrder``, each as often as planned: of
  an epoch every row once, no row on two ranks.

Tensors are compared by checksums of their bits; only these travel. A difference is found and named.
"""

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dga_scale.corpus.loading.mixture import Mixture
from dga_scale.corpus.loading.streams import StepBatches
from dga_scale.errors import UserError
from dga_scale.preservation.protection import Protection
from dga_scale.train.seeds import seed_of
from dga_scale.train.trainer import Trainer
from dga_scale.zero.engine import Engine
from dga_scale.zero.shards import LANGUAGE_MODEL_PREFIX, frozen_shares, local_shards, shape_of

T = TypeVar("T", bound=Hashable)

_CHUNK = 1 << 18
"""The number of entries of one checksum: a difference is sought among so many."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_SOURCE = 48
"""The bit from which on a key holds the number of the row's corpus, above the row."""


OwnedPart = tuple[str, int, int]
"""The part of a parameter that one rank alone keeps: name, start, length."""


@dataclass(frozen=True)
class _Report:
    """A rank's report to the others."""

    checksums: dict[str, int]
    figures: dict[str, Hashable]
    owned: list[OwnedPart]
    problem: str | None
    rows: dict[int, np.ndarray]


class Invariants:
    """The checks of one rank, and the rows that it has used since the last one.

    Args:
        trainer: The trainer that is checked.
        every: The number of steps between two checks; 0: none.

    """

    def __init__(self, trainer: Trainer, every: int) -> None:
        self._trainer, self._every = trainer, every
        self._cluster = trainer.cluster
        mixture = trainer.inputs.mixture  # its state belongs to the stream's thread: another of the same
        self._plan = Mixture(mixture.corpora, mixture.shares[1:], trainer.config.run.seed)
        self._rows: dict[int, np.ndarray] = {}

    def after_step(self, batches: StepBatches) -> None:
        """Check, if it is due, right after a training step; every rank has to call it after each.

        Raises:
            UserError: An invariant does not hold; see ``check``.
        """
        if self._every == 0:
            return
        self._rows[batches.step] = np.concatenate(
            [_keys(batch.sources.numpy(), batch.sample_ids.numpy()) for batch in batches.micro_batches]
        )
        done = batches.step + 1
        if done % self._every == 0 or done == self._trainer.config.optimization.max_steps:
            self.check(done)

    def check(self, done: int) -> None:
        """Check now, after ``done`` steps; every rank has to call it.

        Raises:
            UserError: An invariant does not hold: which, on which rank, both values; raised on all ranks.
        """
        if self._every == 0:
            return
        shared = dict(_replicated(self._trainer))
        own = _Report(
            checksums=dict(zip(shared, _checksums(list(shared.values())), strict=True)),
            figures=_figures(self._trainer),
            owned=list(_owned(self._trainer.engine)),
            problem=self._own_problem(done),
            rows=self._rows,
        )
        self._rows = {}
        reports = self._cluster.all_gather_object(own)
        problem = (
            next((report.problem for report in reports if report.problem), None)
            or self._unequal_tensor([report.checksums for report in reports], shared)
            or _unequal_figure([report.figures for report in reports])
            or _incomplete([report.owned for report in reports], _spread(self._trainer.engine))
            or self._unplanned_rows([report.rows for report in reports])
        )
        if problem:
            raise UserError(
                f"--check_invariants, after step {done}: {problem}. No setting fixes that: a rank's memory, "
                "processor or driver may be at fault, or the program. Start the same command again without "
                "that rank's node: it resumes from the newest checkpoint."
            )

    def _own_problem(self, done: int) -> str | None:
        """Check what needs no other rank: seed, learning rate, masters and the forward passes' weights."""
        trainer, rank = self._trainer, self._cluster.rank
        if self._rows:  # a step was made: before the first there is nothing planned yet
            planned, found = seed_of(trainer.config.run.seed, 0, done - 1, rank), torch.initial_seed()
            if found != planned:
                return f"the seed of dropout is {found} on rank {rank}, planned was {planned}"
            rate = trainer.start.schedule.learning_rate(done - 1)
            for group in trainer.engine.basic_optimizer.param_groups:
                if group["lr"] != rate * group["lr_scale"]:
                    planned_rate = rate * group["lr_scale"]
                    return f"a learning rate on rank {rank} is {group['lr']:g}, planned was {planned_rate:g}"
        return _stale_weight(trainer.engine, rank)

    def _unequal_tensor(self, checksums: Sequence[dict[str, int]], tensors: dict[str, Tensor]) -> str | None:
        """Find the first tensor that differs between ranks, and its first differing entry."""
        for name in checksums[0]:
            pair = _odd_one([of_rank.get(name) for of_rank in checksums])
            if pair is not None:
                break
        else:
            return None
        odd, usual = pair
        ours, mine = self._cluster.rank in pair, tensors.get(name)
        asked = mine if ours else None
        sums = self._cluster.all_gather_object(None if asked is None else _chunk_sums(asked).tolist())
        one, other = sums[odd], sums[usual]
        if one is None or other is None or len(one) != len(other):
            return f"{name} has another size on rank {odd} than on rank {usual}, or is missing there"
        chunk = next(k for k, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
        part = None if asked is None else asked.reshape(-1)[chunk * _CHUNK : (chunk + 1) * _CHUNK].cpu()
        parts = self._cluster.all_gather_object(part)
        a, b = parts[odd], parts[usual]
        assert a is not None
        assert b is not None
        (entry,) = (_bits(a) != _bits(b)).nonzero()[0].tolist()
        return (
            f"{name} is not the same on all ranks: entry {chunk * _CHUNK + entry} is {a[entry].item()!r} on "
            f"rank {odd}, {b[entry].item()!r} on rank {usual}"
        )

    def _unplanned_rows(self, read: Sequence[dict[int, np.ndarray]]) -> str | None:
        """Compare the rows that all ranks have used with the plan, step by step."""
        rows_a_step = self._trainer.inputs.resolved.global_batch_size
        for step in sorted({step for of_rank in read for step in of_rank}):
            picks = self._plan.picks(step * rows_a_step, (step + 1) * rows_a_step)
            planned = Counter(_keys(picks.sources, picks.rows).tolist())
            found = Counter(row for of_rank in read for row in of_rank.get(step, np.empty(0)).tolist())
            wrong = next((row for row in planned | found if planned[row] != found[row]), None)
            if wrong is None:
                continue
            ranks = [r for r, of_rank in enumerate(read) if wrong in of_rank.get(step, np.empty(0)).tolist()]
            source, row = wrong >> _SOURCE, wrong & ((1 << _SOURCE) - 1)
            by = f"by ranks {', '.join(map(str, ranks))}" if ranks else "by no rank"
            return (
                f"row {row} of {self._plan.corpora[source].path} was read {found[wrong]} times in step "
                f"{step + 1} ({by}), planned was {planned[wrong]}"
            )
        return None


def _replicated(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    """Yield everything that each rank holds whole, with a name for messages."""
    engine: Any = trainer.engine
    for name, parameter in engine.module.named_parameters():
        if not hasattr(parameter, "ds_id") or _kept_whole(parameter):
            yield f"weight {name}", parameter.data
    for name, buffer in engine.module.named_buffers():
        yield f"buffer {name}", buffer
    if engine.zero_optimization_stage() == 0:
        for shard in local_shards(engine):
            (fragment,) = shard.fragments
            if engine.optimizer is not engine.basic_optimizer:
                yield f"fp32 weight {fragment.name}", fragment.values
            for kind, moment in engine.basic_optimizer.state.get(shard.stepped, {}).items():
                if kind != "step":
                    yield f"{kind} of {fragment.name}", moment
    yield from _of_protection(trainer.protection)


def _of_protection(protection: Protection) -> Iterator[tuple[str, Tensor]]:
    """Yield the protection, which gates take, and the soft-mask's factors."""
    for kind, a in protection.a.items():
        yield f"protection of {kind}", a
    for name, factors in protection.factors.items():
        for factor in factors:
            yield f"soft-mask of {name} along axis {factor.dim}", factor.scale


def _kept_whole(parameter: Any) -> bool:
    """Return whether ZeRO-3 keeps a parameter on every rank, as it is small."""
    return bool(parameter.ds_persist) and parameter.ds_status.name == "AVAILABLE"


def _owned(engine: Engine) -> Iterator[OwnedPart]:
    """Yield the parts of parameters that this rank alone keeps."""
    if engine.zero_optimization_stage() > 0:
        for shard in local_shards(engine):
            for fragment in shard.fragments:
                yield fragment.name, fragment.start, fragment.values.numel()
    for name, start, _, values in frozen_shares(engine):
        yield name, start, values.numel()


def _spread(engine: Engine) -> dict[str, int]:
    """Return the sizes of all parameters of which each rank keeps a part, by name."""
    return {
        name.removeprefix(LANGUAGE_MODEL_PREFIX): torch.Size(shape_of(parameter)).numel()
        for name, parameter in engine.module.named_parameters()
        # Of what is not trained, a teacher is no part of a checkpoint.
        if (
            engine.zero_optimization_stage() > 0
            if parameter.requires_grad
            else name.startswith(LANGUAGE_MODEL_PREFIX)
        )
    }


def _incomplete(owned: Sequence[Sequence[OwnedPart]], sizes: Mapping[str, int]) -> str | None:
    """Find an entry that belongs to no rank, or to two."""
    fragments: dict[str, list[tuple[int, int, int]]] = {name: [] for name in sizes}
    for rank, of_rank in enumerate(owned):
        for name, start, length in of_rank:
            fragments[name].append((start, length, rank))
    for name, parts in fragments.items():
        end, last = 0, -1
        for start, length, rank in [*sorted(parts), (sizes[name], 0, -1)]:
            if start > end:
                return f"entries {end} to {start - 1} of {name} belong to no rank"
            if start < end:
                other = f"rank {rank}" if rank >= 0 else f"none (it has {sizes[name]} entries)"
                return f"entry {start} of {name} belongs to rank {last} and to {other}"
            end, last = start + length, rank
    return None


def _stale_weight(engine: Engine, rank: int) -> str | None:
    """Find a weight of the forward passes that is not its master, rounded."""
    parameters: dict[str, Any] = {
        name.removeprefix(LANGUAGE_MODEL_PREFIX): p for name, p in engine.module.named_parameters()
    }
    unequal = []
    for shard in local_shards(engine):
        for fragment in shard.fragments:
            parameter = parameters[fragment.name]
            if hasattr(parameter, "ds_tensor"):
                used = parameter.ds_tensor.data.view(-1)[: fragment.values.numel()]
            else:
                used = parameter.data.view(-1)[fragment.start : fragment.start + fragment.values.numel()]
            rounded = fragment.values.to(used.dtype).to(used.device)
            unequal.append((fragment, used, rounded, (_bits(rounded) != _bits(used)).any()))
    if not unequal or not bool(torch.stack([each.cpu() for *_, each in unequal]).any()):
        return None
    fragment, used, rounded, _ = next(entry for entry in unequal if bool(entry[3]))
    entry = int((_bits(rounded) != _bits(used)).nonzero()[0])
    return (
        f"entry {fragment.start + entry} of {fragment.name} is {used[entry].item()!r} in the model of rank "
        f"{rank}, its optimizer has {rounded[entry].item()!r}"
    )


def _figures(trainer: Trainer) -> dict[str, Hashable]:
    """Return the numbers that are the same on all ranks."""
    engine: Any = trainer.engine
    states = engine.basic_optimizer.state.values()
    return {
        "--seed": trainer.config.run.seed,
        "the number of steps done": engine.global_steps,
        "the number of refused steps": engine.skipped_steps,
        "the optimizer's number of steps": tuple(sorted({float(s.get("step", 0)) for s in states})),
        "the learning rate": tuple(group["lr"] for group in engine.basic_optimizer.param_groups),
        "the loss scale": getattr(getattr(engine.optimizer, "loss_scaler", None), "cur_scale", 1),
    }


def _unequal_figure(figures: Sequence[dict[str, Hashable]]) -> str | None:
    for name in figures[0]:
        values = [of_rank[name] for of_rank in figures]
        pair = _odd_one(values)
        if pair is not None:
            odd, usual = pair
            return f"{name} is {values[odd]} on rank {odd}, {values[usual]} on rank {usual}"
    return None


def _odd_one(values: Sequence[T]) -> tuple[int, int] | None:
    """Find a rank whose value is not that of most, and one of those; None if all have the same."""
    ((usual, count),) = Counter(values).most_common(1)
    if count == len(values):
        return None
    return next(rank for rank, value in enumerate(values) if value != usual), values.index(usual)


def _keys(sources: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return one number for each row of several corpora."""
    return (sources.astype(np.int64) << _SOURCE) + rows


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(_BITS[tensor.element_size()])


def _chunk_sums(tensor: Tensor) -> Tensor:
    """Compute a checksum of each chunk of a tensor's bits, int64: entries times odd numbers."""
    bits = _bits(tensor.detach().contiguous())
    dtype = torch.promote_types(bits.dtype, torch.int32)
    factors = torch.arange(1, 2 * min(_CHUNK, len(bits)) + 1, 2, dtype=dtype, device=bits.device)
    parts = bits.split(_CHUNK)
    return torch.stack([(part.to(dtype) * factors[: len(part)]).sum(dtype=torch.int64) for part in parts])


def _checksums(tensors: Sequence[Tensor]) -> list[int]:
    """Compute a checksum of each tensor's bits; the device is waited for once, after all are queued."""
    sums = []
    for tensor in tensors:
        chunks = _chunk_sums(tensor)
        factors = torch.arange(1, 2 * len(chunks) + 1, 2, device=chunks.device)
        sums.append((chunks * factors).sum() + tensor.numel())
    return [int(each) for each in sums]
