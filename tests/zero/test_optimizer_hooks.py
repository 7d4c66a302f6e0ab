"""Around the optimizer's step: masks see exactly what is stepped, and a NaN or infinity steps nothing."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor

from dga_scale.preservation.fragments import Fragment
from dga_scale.zero.engine import global_grad_norm
from dga_scale.zero.optimizer_hooks import local_fragments, step_was_refused, wrap_optimizer_step
from tests.helpers.ranks import run_ranks
from tests.helpers.training import (
    FP16_HERE,
    Setup,
    full_state,
    full_weights,
    tiny_bert,
    tiny_engine,
    train_step,
)

EVERY_OPTIMIZER = (
    Setup(0, "fp32", accumulation=2),
    Setup(0, "fp32", clipping=0.0),
    Setup(0, "bf16", accumulation=2),
    Setup(1, "fp32", weight_decay=0.1),
    Setup(1, "bf16", accumulation=2),
    Setup(2, "fp32", accumulation=2, weight_decay=0.1),
    Setup(2, "bf16", clipping=0.0),
    Setup(2, "bf16", accumulation=2, offload=True),
    Setup(3, "fp32", sub_group_size=700, weight_decay=0.1),
    Setup(3, "bf16", accumulation=2, persistence=1000),
    Setup(3, "bf16", offload=True, clipping=0.0, sub_group_size=700),
    Setup(3, "bf16", offload=True, offload_parameters=True, persistence=1000),
)
"""Each class of optimizer that DeepSpeed builds, with and without what changes its path."""


def _everything(engine: Any) -> dict[str, Any]:
    """All that a step may change: the optimizer's weights, moments and counts, and the passes' weights."""
    counts = [float(state["step"]) for state in engine.basic_optimizer.state.values()]
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        passes = [p.detach().clone() for p in engine.module.parameters()]
    return {
        "weights": list(full_weights(engine).values()),
        "moments": [m for key in ("exp_avg", "exp_avg_sq") for m in full_state(engine, key).values()],
        "counts": counts,
        "passes": passes,
    }


def _same(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what differs in any bit."""
    return [
        kind
        for kind, values in one.items()
        if not all(
            torch.equal(a, b) if isinstance(a, Tensor) else a == b
            for a, b in zip(values, other[kind], strict=True)
        )
    ]


def _poisoned(setups: Sequence[Setup], poison: str) -> list[dict[str, Any]]:
    found = []
    for setup in setups:
        engine = tiny_engine(setup)
        train_step(engine, 0)
        first_refused = step_was_refused(engine)
        before = _everything(engine)
        train_step(engine, 1, poison)
        report = {
            "refused": (first_refused, step_was_refused(engine)),
            "norm": float(global_grad_norm(engine)),
            "changed": _same(before, _everything(engine)),
        }
        train_step(engine, 2)
        report |= {"refused after": step_was_refused(engine), "skipped": engine.skipped_steps}
        after = _everything(engine)
        engine.destroy()
        clean = tiny_engine(setup)
        train_step(clean, 0)
        train_step(clean, 2)
        report["differs from a run without"] = _same(after, _everything(clean))
        clean.destroy()
        found.append(report)
    return found


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_nan_on_one_rank_steps_nothing_on_any(poison: str) -> None:
    expected = {
        "refused": (False, True),
        "norm": math.inf,
        "changed": [],
        "refused after": False,
        "skipped": 1,
        "differs from a run without": [],
    }
    setups = EVERY_OPTIMIZER if poison == "loss" else EVERY_OPTIMIZER[1::4]
    for reports in run_ranks(2, _poisoned, setups, poison):
        for setup, report in zip(setups, reports, strict=True):
            if report["norm"] != math.inf:  # ZeRO-0 in fp32 tells which it was
                assert math.isnan(report["norm"])
                report["norm"] = math.inf
            assert report == expected, setup


def _loss_scales(setups: Sequence[Setup]) -> list[tuple[list[float], list[str]]]:
    found = []
    for setup in setups:
        engine = tiny_engine(setup)
        train_step(engine, 0)
        before, scales = _everything(engine), [engine.optimizer.loss_scaler.cur_scale]
        for step in range(1, 5):
            train_step(engine, step, "loss" if step == 1 else "")
            scales.append(engine.optimizer.loss_scaler.cur_scale)
            if step == 1:
                changed = _same(before, _everything(engine))
        assert engine.skipped_steps == 1
        engine.destroy()
        found.append((scales, changed))
    return found


@pytest.mark.skipif(not FP16_HERE, reason="this CPU does not compute in fp16")
def test_fp16_lowers_its_loss_scale_for_a_refused_step_and_raises_it_again() -> None:
    setups = [
        Setup(stage, "fp16", accumulation=2, offload=offload)
        for stage in (1, 2, 3)
        for offload in (False, True)
    ]
    for found in run_ranks(2, _loss_scales, setups):
        assert found == [([1024, 512, 512, 512, 1024], [])] * len(setups)


def _fragments(setups: Sequence[Setup]) -> list[dict[str, Tensor]]:
    found = []
    for setup in setups:
        engine = tiny_engine(setup)
        found.append(full_weights(engine))
        engine.destroy()
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_fragments_hold_every_entry_and_start_from_the_models_fp32_weights(world_size: int) -> None:
    """In bf16 too: DeepSpeed would start from the rounded ones."""
    expected = {name: p.detach() for name, p in tiny_bert().named_parameters()}
    setups = EVERY_OPTIMIZER if world_size == 2 else EVERY_OPTIMIZER[2::3]
    for weights in run_ranks(world_size, _fragments, setups):
        for setup, found in zip(setups, weights, strict=True):
            assert found.keys() == expected.keys(), setup
            for name, tensor in expected.items():
                assert torch.equal(found[name], tensor), (setup, name)


def _copies(fragments: Sequence[Fragment]) -> list[Any]:
    return [(fragment.key[:3], fragment.shape, fragment.values.clone()) for fragment in fragments]


def _into(record: list[Any]) -> Callable[[Sequence[Fragment]], None]:
    return lambda fragments: record.append(_copies(fragments))


def _recorded(setups: Sequence[Setup]) -> list[tuple[list[Any], list[Any], list[Any], int]]:
    found = []
    for setup in setups:
        engine = tiny_engine(setup)
        before: list[Any] = []
        after: list[Any] = []

        wrap_optimizer_step(engine, _into(before), _into(after))
        own = _copies(local_fragments(engine))
        train_step(engine, 0)
        stepped = _copies(local_fragments(engine))
        calls = len(before)
        train_step(engine, 1, "loss")
        assert len(before) == len(after) == calls, "called for a refused step"
        found.append((own, [f for call in before for f in call], [f for call in after for f in call], calls))
        assert _plain(stepped) == _plain(found[-1][2]), setup
        engine.destroy()
    return found


def _plain(fragments: list[Any]) -> dict[Any, list[float]]:
    plain = {(key, shape): values.tolist() for key, shape, values in fragments}
    assert len(plain) == len(fragments), "a fragment occurs twice"
    return plain


def test_masks_are_called_around_each_part_of_the_step() -> None:
    for reports in run_ranks(2, _recorded, EVERY_OPTIMIZER):
        for setup, (own, before, after, calls) in zip(EVERY_OPTIMIZER, reports, strict=True):
            assert _plain(before) == _plain(own), setup
            assert _plain(after).keys() == _plain(own).keys(), setup
            moved = sum(_plain(after)[key] != values for key, values in _plain(own).items())
            assert moved > 0.8 * len(own), setup
            if setup.sub_group_size:
                assert calls >= 10, "ZeRO-3 steps its sub-groups one by one"


def _first_step(setups: Sequence[Setup]) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    found = []
    for setup in setups:
        engine = tiny_engine(setup)
        train_step(engine, 0)
        found.append((full_weights(engine), full_state(engine, "exp_avg")))
        engine.destroy()
    return found


def test_adams_first_step_is_its_first() -> None:
    """|step| = lr in bias-corrected Adam, whatever the gradient; DeepSpeed's bf16 ZeRO-0 counts one more."""
    start = {name: p.detach() for name, p in tiny_bert().named_parameters()}
    setups = [Setup(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
    for setup, (weights, momentum) in zip(setups, run_ranks(2, _first_step, setups)[0], strict=True):
        for name, before in start.items():
            clear = momentum[name].abs() > 1e-4  # far above eps
            steps = (weights[name] - before).abs()[clear]
            torch.testing.assert_close(steps, torch.full_like(steps, 1e-3), rtol=0.02, atol=0, msg=str(setup))
