"""Weight regularisation and its Fisher under DeepSpeed, against one process of plain PyTorch."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.checkpoint.fisher import load_fisher, save_fisher
from dga_scale.corpus.loading.batches import Batch
from dga_scale.errors import UserError
from dga_scale.launch.world import join_cluster, single_process
from dga_scale.preservation.fisher import measure_fisher
from dga_scale.preservation.fragments import Fragment
from dga_scale.preservation.weight_regularisation import FragmentKey, WeightPenalty, key_of
from dga_scale.zero.optimizer_hooks import add_to_gradients, local_fragments
from tests.helpers.batches import rows_of
from tests.helpers.ranks import run_ranks
from tests.helpers.reference import per_example_fisher
from tests.helpers.toy import toy_batch
from tests.helpers.training import (
    LEARNING_RATE,
    MaskedLM,
    Setup,
    full_weights,
    global_batch,
    tiny_bert,
    tiny_engine,
    train_step,
)
from tests.zero.test_optimizer_hooks import EVERY_OPTIMIZER

STEPS = 4
WEIGHT = 100.0
"""Makes the pull as strong as the data's gradient after a step or two."""

# The epsilon: see tests/helpers/reference.py.
SETUPS = [replace(setup, clipping=0.0, weight_decay=0.0, epsilon=1e-2) for setup in EVERY_OPTIMIZER]


def fisher_of(name: str, shape: Sequence[int]) -> Tensor:
    """An F that is made up, by the name of the parameter: of the full parameter, flat."""
    generator = torch.Generator().manual_seed(len(name))
    return 2 * torch.rand(torch.Size(shape).numel(), generator=generator)


def part_of(fragment: Fragment) -> Tensor:
    whole = fisher_of(fragment.name, fragment.shape)
    return whole[fragment.start : fragment.start + fragment.values.numel()]


def trained(setups: Sequence[Setup], ewc: bool) -> list[dict[str, Any]]:
    found = []
    for setup in setups:
        engine = tiny_engine(setup)
        copies = dist.get_world_size() if setup.stage == 0 else 1
        fragments = local_fragments(engine)
        fisher = {key_of(f): part_of(f) for f in fragments} if ewc else None
        weight_penalty = WeightPenalty(fragments, WEIGHT, fisher, copies)
        add_to_gradients(engine, weight_penalty.add_gradient)
        for step in range(STEPS):
            train_step(engine, step)
        weights, cluster = full_weights(engine), join_cluster()
        found.append(
            {
                "weights": weights,
                "penalty": weight_penalty.penalty(local_fragments(engine), cluster.sum),
                "bytes": weight_penalty.bytes_per_rank(),
            }
        )
        engine.destroy()
    return found


def reference(setup: Setup, ewc: bool, weight: float = WEIGHT) -> tuple[dict[str, Tensor], float]:
    """The weights after the steps, and the penalty there."""
    model = tiny_bert()
    masters = {name: p.detach().clone() for name, p in model.named_parameters()}
    start = {name: master.clone() for name, master in masters.items()}
    fisher = {
        name: fisher_of(name, p.shape).view_as(p) if ewc else torch.ones_like(p) for name, p in start.items()
    }
    model = model.to(torch.bfloat16 if setup.precision == "bf16" else torch.float32)
    optimizer = torch.optim.AdamW(masters.values(), lr=LEARNING_RATE, eps=setup.epsilon, weight_decay=0.0)
    for step in range(STEPS):
        ids, labels = global_batch(step)
        model.zero_grad()
        logits = model(input_ids=ids).logits.float()
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        for name, parameter in model.named_parameters():
            masters[name].grad = parameter.grad.float()
        if setup.clipping:
            torch.nn.utils.clip_grad_norm_(masters.values(), setup.clipping)
        for name, master in masters.items():
            master.grad += weight * fisher[name] * (master - start[name])
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(masters[name])
    penalty = sum((fisher[n] * (masters[n] - start[n]) ** 2).sum().item() for n in masters)
    return masters, weight / 2 * penalty


def deviation(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Length of the difference over the length of the movement, over all weights."""
    start = dict(tiny_bert().named_parameters())
    difference = sum((ours[n] - w).double().square().sum() for n, w in theirs.items())
    return (difference / sum((w - start[n]).double().square().sum() for n, w in theirs.items())).sqrt().item()


@pytest.mark.parametrize("ewc", [False, True])
def test_every_stage_trains_as_plain_pytorch(ewc: bool) -> None:
    setups = [*SETUPS[ewc::2], replace(SETUPS[5 + ewc], clipping=0.02)]
    entries = sum(p.numel() for p in tiny_bert().parameters())
    for reports in zip(setups, *run_ranks(2, trained, setups, ewc), strict=True):
        setup, first, second = reports
        weights, penalty = reference(setup, ewc)
        # Without the penalty it would be far off: the pull is no rounding.
        assert deviation(reference(setup, ewc, weight=0.0)[0], weights) > 0.2, setup
        assert deviation(first["weights"], weights) < (1e-4 if setup.precision == "fp32" else 0.02), setup
        assert first["penalty"] == second["penalty"]
        assert first["penalty"] == pytest.approx(penalty, rel=1e-4 if setup.precision == "fp32" else 0.05)
        size = (4 + 4 * ewc) * entries * (2 if setup.stage == 0 else 1)
        assert first["bytes"] + second["bytes"] == size, setup


class Measured(MaskedLM):
    """The tiny model, which also calls what it is given on a batch."""

    def __init__(self) -> None:
        super().__init__(tiny_bert(dropout=0.2))
        self.anatomy = anatomy_of(self.lm)

    def forward(self, *inputs: Any, compute: Any = None) -> Any:
        return super().forward(*inputs) if compute is None else compute(*inputs)


MEASURED = (
    Setup(0),
    Setup(1),
    Setup(2, "bf16"),
    Setup(3),
    Setup(3, persistence=1000),
    Setup(2, offload=True),
)
ROWS = 8


def measured(setups: Sequence[Setup], size: int, folder: str) -> list[dict[str, Tensor]]:
    """F of the whole model, measured on this rank's share of the rows, saved, and put together again."""
    cluster = join_cluster()
    found = []
    for number, setup in enumerate(setups):
        engine = tiny_engine(setup, Measured())
        share = ROWS // cluster.world_size
        own = rows_of(toy_batch(ROWS), slice(cluster.rank * share, (cluster.rank + 1) * share))
        batches = [rows_of(own, slice(start, start + size)) for start in range(0, share, size)]
        fragments = local_fragments(engine)
        fisher = measure_fisher(engine.module, batches, fragments, cluster.sum, normalize=False)
        assert fisher.examples == ROWS
        copies = cluster.world_size if setup.stage == 0 else 1
        path = Path(folder) / f"{cluster.world_size}-{number}"
        save_fisher(path, fisher.values, fragments, cluster, copies)
        again = load_fisher(path, fragments, cluster)
        assert again.keys() == fisher.values.keys()
        assert all(torch.equal(again[key], own) for key, own in fisher.values.items())
        found.append(whole(fisher.values, fragments))
        loss = train_step(engine, 0)  # nothing is left behind that would trouble a step
        found[-1]["loss"] = torch.tensor(loss)
        engine.destroy()
    return found


def whole(values: dict[FragmentKey, Tensor], fragments: Sequence[Fragment]) -> dict[str, Tensor]:
    pieces: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pieces, [(f.name, f.start, f.shape, values[key_of(f)]) for f in fragments])
    full: dict[str, Tensor] = {}
    for name, start, shape, own in (piece for part in pieces for piece in part):
        full.setdefault(name, torch.full(shape, torch.nan)).view(-1)[start : start + len(own)] = own
    return full


def expected_fisher(batch: Batch) -> dict[str, Tensor]:
    return per_example_fisher(tiny_bert(), batch)


@pytest.mark.parametrize(("world_size", "size"), [(1, 8), (2, 4), (2, 1)])
def test_the_fisher_is_that_of_one_example_at_a_time(world_size: int, size: int, tmp_path: Path) -> None:
    setups = MEASURED if size > 1 else MEASURED[3:4]
    expected = expected_fisher(toy_batch(ROWS))
    largest = max(values.max().item() for values in expected.values())
    for found in run_ranks(world_size, measured, setups, size, str(tmp_path)):
        for setup, fisher in zip(setups, found, strict=True):
            assert torch.isfinite(fisher.pop("loss"))
            assert fisher.keys() == expected.keys()
            for name, values in expected.items():
                if setup.precision == "fp32":
                    torch.testing.assert_close(
                        fisher[name], values, rtol=1e-3, atol=1e-8 * largest, msg=f"{setup}: {name}"
                    )
                else:
                    close = (fisher[name] - values).norm() <= 0.1 * values.norm() + 1e-6 * largest
                    assert close, f"{setup}: {name}"


def test_a_fisher_is_read_in_any_cut(tmp_path: Path) -> None:
    """What two ranks wrote, read by one; and what is not there is named."""
    run_ranks(2, measured, [Setup(3)], 4, str(tmp_path))
    expected = expected_fisher(toy_batch(ROWS))
    shapes = {name: tuple(values.shape) for name, values in expected.items()}
    fragments = [Fragment(name, 3, shape, torch.zeros(20)) for name, shape in shapes.items()]
    found = load_fisher(tmp_path / "2-0", fragments, single_process())
    for fragment in fragments:
        part = expected[fragment.name].flatten()[3:23]
        torch.testing.assert_close(found[key_of(fragment)], part, rtol=1e-3, atol=1e-10)
    with pytest.raises(UserError, match=r"lacks the Fisher of another \(4,\): it is of another model"):
        load_fisher(tmp_path / "2-0", [Fragment("another", 0, (4,), torch.zeros(4))], single_process())
