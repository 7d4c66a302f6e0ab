"""Sparse experts: copies of a sublayer, each for the sequences whose mean input is nearest its centre.

CSE (Dong et al., NeurIPS 2024): hard top-1 per sequence, no gate weight, no auxiliary loss. Each expert runs
its own sequences only, so a sequence costs what it costs in the dense model.

Collectives: with several ranks a training pass calls every expert on every rank, an unused one on the first
row of the batch, whose output is dropped. The autograd graph, and with it the order in which gradients become
ready, is then the same on all ranks, which DeepSpeed's reduction of gradients relies on (ZeRO-2 adds up
buckets of gradients in the order they arrive), and no parameter is without a gradient on one rank. Under
ZeRO-3, where a module's call gathers its parameters from all ranks, evaluation does the same; and one rank
alone does so in training, since ZeRO-3 takes a parameter without a new gradient for one with its last. This
costs at most one row an unused expert and pass.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dga_scale.errors import UserError

BATCHED = ("hidden_states", "attention_mask", "position_embeddings", "position_ids", "position_bias")
"""The keyword arguments of sublayers that have one entry an example (or one for all)."""
SHARED = ("relative_pos", "rel_embeddings")
"""The keyword arguments of sublayers that are the same for all examples (DeBERTa)."""


class Router(nn.Module):
    """Chooses the expert of each sequence: ``argmin_j ||v' - c_j|| / r_j`` with ``v' = mean_t(input) P``.

    The buffers stay fp32 whatever the model is cast to: in bf16 an update of a centre by 1% would round to
    nothing.

    Args:
        hidden_size: The width H of the sublayer's input.
        projection: The width d' of v'.
        experts: The number of centres.
        alpha: The share of a centre that remains after one sequence.
    """

    projection: Tensor  # (H, d'), Gaussian, never changed
    centres: Tensor  # (experts, d')
    radii: Tensor  # (experts,)

    def __init__(self, hidden_size: int, projection: int, experts: int, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.register_buffer("projection", torch.zeros(hidden_size, projection, dtype=torch.float32))
        self.register_buffer("centres", torch.zeros(experts, projection, dtype=torch.float32))
        self.register_buffer("radii", torch.ones(experts, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Follow the model to another device, but not to another precision."""
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    @torch.no_grad()
    def features(self, states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Compute v' (B, d') in fp32 of a sublayer's input (B, T, H); mask (B, T), None: all tokens real."""
        return project(states, attention_mask, self.projection)

    @torch.no_grad()
    def choose(self, features: Tensor) -> Tensor:
        """Choose an expert for each v' (B, d'): (B,) long."""
        # Not by matrix products: they lose the small distances that matter here.
        distances = (features[:, None] - self.centres).norm(dim=-1)  # (B, experts)
        return (distances / self.radii).argmin(dim=1)

    @torch.no_grad()
    def totals(self, features: Tensor, chosen: Tensor) -> Tensor:
        """Count each expert's sequences and add up their v': (experts, 1 + d') fp64; NaNs count for none."""
        finite = features.isfinite().all(dim=1, keepdim=True)
        rows = torch.cat([finite, torch.where(finite, features, 0.0)], dim=1).double()
        empty = torch.zeros(len(self.centres), rows.shape[1], dtype=torch.float64, device=rows.device)
        return empty.index_add(0, chosen, rows)

    @torch.no_grad()
    def update(self, totals: Tensor) -> None:
        """Move the centres: c <- alpha^n c + (1 - alpha^n) mean(v') for the n sequences of each.

        For one sequence that is c <- alpha c + (1 - alpha) v'. For several it does not depend on their order,
        nor on how they lie on ranks.
        """
        count, total = totals[:, :1], totals[:, 1:]
        kept = self.alpha**count
        moved = kept * self.centres + (1 - kept) * total / count.clamp(min=1)
        self.centres.copy_(torch.where(count > 0, moved, self.centres.double()))


def project(states: Tensor, attention_mask: Tensor | None, projection: Tensor) -> Tensor:
    """Average states (B, T, H) over real tokens and multiply by the projection (H, d'): (B, d') in fp32."""
    if states.dim() != 3 or (attention_mask is not None and attention_mask.shape != states.shape[:2]):
        given = None if attention_mask is None else tuple(attention_mask.shape)
        raise UserError(
            f"experts need states of (batch, tokens, width) and a mask of (batch, tokens), not "
            f"{tuple(states.shape)} and {given}; use an attention implementation that keeps the batch axis "
            "(attn_implementation sdpa, or flash_attention_2 on padded batches)"
        )
    states = states.float()
    if attention_mask is None:
        return states.mean(dim=1) @ projection
    real = attention_mask.to(states.dtype).unsqueeze(-1)  # (B, T, 1)
    return (states * real).sum(dim=1) / real.sum(dim=1).clamp(min=1) @ projection


class SparseSublayer(nn.Module):
    """The experts of one sublayer: expert 0 is the dense sublayer itself, the others are copies held here.

    The dense modules' ``forward`` is replaced: it sends each sequence to its expert.

    Args:
        names: The names of the dense modules inside their block.
        dense: The modules, in the order they are called; the first one's input determines the route.
        router: The router, with one centre an expert.
        state: The state of the model's current forward pass.
    """

    def __init__(
        self, names: Sequence[str], dense: Sequence[nn.Module], router: Router, state: "ForwardState"
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = nn.ModuleList(
            nn.ModuleDict({name: copy.deepcopy(module) for name, module in zip(names, dense, strict=True)})
            for _ in range(len(router.centres) - 1)
        )
        self._names = tuple(names)
        self._dense = tuple(dense)  # a tuple: they stay children of the block alone
        self.state = state
        self._rows: list[tuple[int, Tensor]] = []
        self._order = torch.empty(0)
        self.last: tuple[Tensor, Tensor] | None = None  # v' and expert of each sequence of the last forward
        # The sequences of each expert, of all ranks: of the last optimizer step, and of all steps so far.
        self.in_step: list[int] = [0] * len(router.centres)
        self.in_all: list[int] = [0] * len(router.centres)
        for number, module in enumerate(dense):
            module.forward = partial(self._dispatch, number)

    def expert(self, index: int) -> tuple[nn.Module, ...]:
        """Return the modules of one expert."""
        if index == 0:
            return self._dense
        copies = self.experts[index - 1]
        assert isinstance(copies, nn.ModuleDict)
        return tuple(copies[name] for name in self._names)

    def count(self, sequences: list[int]) -> None:
        """Note how many sequences of an optimizer step each expert got, over all ranks."""
        self.in_step = sequences
        self.in_all = [before + own for before, own in zip(self.in_all, sequences, strict=True)]

    def _dispatch(self, number: int, *args: Any, **kwargs: Any) -> Any:
        if number == 0:
            self._route(args[0] if args else kwargs["hidden_states"])
        if len(self._rows) == 1:
            return self._call(self._rows[0][0], number, args, kwargs)
        batch = len(self._order)
        _check_arguments(kwargs)
        outputs = []
        for index, rows in self._rows:
            own_args = tuple(_select(value, rows, batch) for value in args)
            own_kwargs = {
                name: _select(value, rows, batch) if name in BATCHED else value
                for name, value in kwargs.items()
            }
            outputs.append(self._call(index, number, own_args, own_kwargs))
        return _merge(outputs, self._order)

    def _call(self, index: int, number: int, args: Any, kwargs: Any) -> Any:
        module = self.expert(index)[number]
        if index == 0:
            return type(module).forward(module, *args, **kwargs)
        return module(*args, **kwargs)

    def _route(self, states: Tensor) -> None:
        """Set which rows each expert runs, and the index of each row's output among all experts' outputs."""
        if self.state.inside:
            features = self.router.features(states, self.state.attention_mask)
            self.last = features, self.router.choose(features)
        # Outside, a checkpointed block is recomputed in the backward pass: it has to take the same route.
        assert self.last is not None
        chosen = self.last[1].tolist()
        own: list[list[int]] = [[] for _ in range(len(self.router.centres))]
        for row, index in enumerate(chosen):
            own[index].append(row)
        every = self._every_expert(states)
        self._rows, order, filled = [], [0] * len(chosen), 0
        for index, rows in enumerate(own):
            if rows or every:
                ran = rows or [0]
                for position, row in enumerate(rows):
                    order[row] = filled + position
                filled += len(ran)
                self._rows.append((index, torch.tensor(ran, device=states.device)))
        self._order = torch.tensor(order, device=states.device)

    def _every_expert(self, states: Tensor) -> bool:
        """Return whether experts without a sequence have to run too; the module's docstring says why."""
        training = self.training and torch.is_grad_enabled()
        partitioned = any(hasattr(parameter, "ds_id") for parameter in self.parameters())
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return training and partitioned
        return training or partitioned


class ForwardState:
    """The state of a model's current forward pass for its experts, which hooks on the trunk maintain.

    After the last training forward pass of an optimizer step the centres are updated by the sequences of all
    ranks, and the sequences of each expert are counted.

    Attributes:
        inside: Whether the trunk is being called.
        attention_mask: The attention mask (B, T) of that call.
        sublayers: The sublayers with experts.
        per_update: The number of training forward passes between two updates of the centres.
    """

    def __init__(self, trunk: nn.Module) -> None:
        self.inside = False
        self.attention_mask: Tensor | None = None
        self.sublayers: list[SparseSublayer] = []
        self.per_update = 1
        self._done = 0
        self._totals = torch.zeros(())
        trunk.register_forward_pre_hook(self._begin, with_kwargs=True)
        trunk.register_forward_hook(self._end)

    def _begin(self, trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs if len(args) < 2 else inspect.signature(trunk.forward).bind(*args, **kwargs).arguments
        self.attention_mask = given.get("attention_mask")
        self.inside = True

    def _end(self, trunk: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.inside = False
        self.attention_mask = None
        if trunk.training and torch.is_grad_enabled():
            self._count()

    def _count(self) -> None:
        totals = []
        for sublayer in self.sublayers:
            assert sublayer.last is not None
            totals.append(sublayer.router.totals(*sublayer.last))
        every = torch.cat(totals)  # (experts of all sublayers, 1 + d'): one collective
        self._totals = every if self._done == 0 else self._totals + every
        self._done += 1
        if self._done < self.per_update:
            return
        self._done = 0
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._totals)
        counts: list[int] = self._totals[:, 0].long().tolist()
        summed = self._totals.split([len(own) for own in totals])
        for sublayer, own in zip(self.sublayers, summed, strict=True):
            sublayer.router.update(own)
            sublayer.count(counts[: len(own)])
            del counts[: len(own)]


def _check_arguments(kwargs: dict[str, Any]) -> None:
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and name not in (*BATCHED, *SHARED):
            raise UserError(
                f"experts can't split {name}, an argument of unknown layout, by examples: use another "
                "attn_implementation (sdpa)"
            )


def _select(value: Any, rows: Tensor, batch: int) -> Any:
    """Select the examples of one expert from an argument; a value that all examples share is kept whole."""
    if isinstance(value, tuple):
        return tuple(_select(each, rows, batch) for each in value)
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch:
        return value.index_select(0, rows)
    return value


def _merge(outputs: Sequence[Any], order: Tensor) -> Any:
    """Concatenate the experts' outputs in the order of the batch."""
    if isinstance(outputs[0], Tensor):
        return torch.cat(list(outputs)).index_select(0, order)
    if isinstance(outputs[0], tuple):
        return tuple(_merge(each, order) for each in zip(*outputs, strict=True))
    return outputs[0]
