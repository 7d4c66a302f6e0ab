"""Update masks scale lines of many parameters at once: to the bits of one by one, in fewer operations."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.preservation import soft_mask
from dga_scale.preservation.soft_mask import UpdateMask, mask_factors
from tests.helpers.tiny_models import TINY
from tests.preservation.test_soft_mask import cut


class Operations(TorchDispatchMode):
    """Counts what is called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def stepped(name: str, pieces: int) -> tuple[dict[str, Tensor], Tensor, Counter[str]]:
    """Weights after two masked steps, what was applied of what was wanted, and operations of the last one."""
    torch.manual_seed(0)
    lm = TINY[name].model()
    anatomy = anatomy_of(lm)
    a = torch.rand(anatomy.num_layers, anatomy.num_heads)
    a[:, 0], a[:, 1] = 0.0, 1.0
    weights = {n: p.detach() for n, p in lm.named_parameters()}
    fragments = cut(weights, pieces, torch.Generator().manual_seed(1))
    mask = UpdateMask(anatomy, mask_factors(anatomy, {"heads": a}))
    for _ in range(2):
        mask.before_step(fragments)
        for weight in weights.values():
            weight += torch.randn_like(weight)
        with Operations() as operations:
            mask.after_step(fragments)
    return weights, mask.applied_over_proposed(lambda sums: sums)["heads"], operations.counts


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("pieces", [1, 3])
def test_together_or_one_by_one(name: str, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    together, applied, few = stepped(name, pieces)
    monkeypatch.setattr(soft_mask, "_CPU_ENTRIES", 0)
    alone, expected, many = stepped(name, pieces)
    for parameter, weight in alone.items():
        assert torch.equal(together[parameter], weight), parameter
    torch.testing.assert_close(applied, expected, rtol=1e-6, atol=0)
    assert few["sub"] < many["sub"]


def test_what_is_scaled_does_not_grow_with_the_blocks() -> None:
    """BERT's two layers, whole: queries, keys with values, their biases, and each output's columns."""
    _, _, counts = stepped("bert", 1)
    assert counts["sub"] == counts["mul_"] == 2 + 2 + 2


def test_fragments_that_moved_are_planned_anew() -> None:
    """As shards of another cut have other lines in other places."""
    lm = TINY["bert"].model()
    anatomy = anatomy_of(lm)
    factors = mask_factors(anatomy, {"heads": torch.full((anatomy.num_layers, anatomy.num_heads), 0.5)})
    weights = {n: p.detach() for n, p in lm.named_parameters()}
    mask = UpdateMask(anatomy, factors)
    for pieces in (1, 4):
        fragments = cut(weights, pieces, torch.Generator().manual_seed(pieces))
        before = {n: w.clone() for n, w in weights.items()}
        mask.before_step(fragments)
        for weight in weights.values():
            weight += 1
        mask.after_step(fragments)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, before[name] + (0.5 if name in factors else 1))


def test_a_step_in_several_calls_is_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-1 and 2 step weights with decay and without apart, ZeRO-3 each of its sub-groups."""
    planned = []
    stacked = soft_mask._stacked
    monkeypatch.setattr(soft_mask, "_stacked", lambda found: planned.append(stacked(found)) or planned[-1])
    lm = TINY["bert"].model()
    anatomy = anatomy_of(lm)
    factors = mask_factors(anatomy, {"heads": torch.full((anatomy.num_layers, anatomy.num_heads), 0.5)})
    fragments = cut({n: p.detach() for n, p in lm.named_parameters()}, 1, torch.Generator().manual_seed(1))
    mask = UpdateMask(anatomy, factors)
    for _ in range(3):
        for group in (fragments[::2], fragments[1::2]):
            mask.before_step(group)
            mask.after_step(group)
    assert len(planned) == 2
