"""Training steps whose contrast spans the global batch, under every ZeRO stage, split and number of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dga_scale.config.parsing import read_config
from dga_scale.launch.world import join_cluster
from dga_scale.logging.run_log import silent_log
from dga_scale.train.inputs import check_inputs
from dga_scale.train.trainer import Trainer
from dga_scale.zero.optimizer_hooks import step_was_refused
from tests.helpers.ranks import REPOSITORY, run_ranks
from tests.helpers.small import SmallWorld
from tests.helpers.training import full_weights
from tests.test_train import arguments

STEPS = 2
Settings = dict[str, Any]
Found = tuple[list[dict[str, float]], dict[str, Tensor]]

ON_TWO_RANKS: list[Settings] = [
    *({"stage": stage, "gradient_accumulation_steps": 2} for stage in (0, 1, 2, 3)),
    {"stage": 2, "gradient_accumulation_steps": 1},
    {"stage": 3, "gradient_accumulation_steps": 4, "gradient_checkpointing": "true", "split_views": "true"},
]


def flags_of(world: SmallWorld, run: Path, settings: Settings) -> list[str]:
    """No dropout, so that numbers of ranks can be compared; and no step of Adam's on rounding noise."""
    values = {"contrast_scope": "global_batch", "dropout": 0.0, "soft_mask": "update", "adam_epsilon": 1e-3}
    values |= settings
    config = REPOSITORY / "ds_configs" / f"zero{values.pop('stage')}.json"
    return arguments(world, run, ds_config=config, warmup_ratio=0.0, **values)


def trainer_of(flags: list[str]) -> Trainer:
    cluster = join_cluster()
    config = read_config(flags)
    inputs = cluster.run_on_all(lambda: check_inputs(config, cluster))
    trainer = Trainer(inputs, cluster, silent_log())
    trainer.protection.set({"heads": torch.linspace(0, 1, 8).view(2, 4)})
    return trainer


def trained(runs: list[list[str]]) -> list[Found]:
    """Of each run: by step the terms' means over ranks, and the weights after the last."""
    found = []
    for flags in runs:
        trainer = trainer_of(flags)
        stream, terms = trainer.stream(0), []
        for step in range(STEPS):
            of_step, _ = trainer.step(stream.step(step))
            ranks = trainer.cluster.world_size
            terms.append({name: trainer.cluster.sum(v).item() / ranks for name, v in of_step.items()})
        found.append((terms, full_weights(trainer.engine)))
        trainer.engine.destroy()
    return found


def assert_same(found: Found, expected: Found, what: str = "one process") -> None:
    for terms, of_plain in zip(found[0], expected[0], strict=True):
        assert terms == pytest.approx(of_plain, rel=3e-6), what
    for name, weight in expected[1].items():
        torch.testing.assert_close(found[1][name], weight, rtol=0, atol=2e-6, msg=f"{name}, {what}")


@pytest.mark.parametrize("views", ["paper", "shared"])
def test_stages_splits_and_ranks_change_nothing(views: str, world: SmallWorld, tmp_path: Path) -> None:
    """Against one process that reads the global batch in one pass, with no state cached."""

    def flags(settings: Settings) -> list[str]:
        return flags_of(world, tmp_path / "run", {"contrast_views": views} | settings)

    whole = {"stage": 2, "gradient_accumulation_steps": 1, "contrast_scope": "micro_batch"}
    four, parts = whole | {"gradient_accumulation_steps": 4}, {"stage": 2, "gradient_accumulation_steps": 4}
    expected, of_parts, cached = run_ranks(1, trained, [flags(s) for s in (whole, four, parts)])[0]
    assert_same(cached, expected)
    apart = of_parts[0][0]["contrastive"] - expected[0][0]["contrastive"]
    assert apart < -0.5, "fewer negatives make another loss"
    cells = ON_TWO_RANKS if views == "paper" else ON_TWO_RANKS[2:4]
    for settings, found in zip(cells, run_ranks(2, trained, [flags(s) for s in cells])[0], strict=True):
        assert_same(found, expected, str(settings))


def refused(runs: list[list[str]]) -> list[tuple[bool, bool, bool]]:
    """Of each run, after a NaN in a first forward pass of the last rank: refused, unchanged, then trained."""
    found = []
    for flags in runs:
        trainer = trainer_of(flags)
        stream, before = trainer.stream(0), full_weights(trainer.engine)

        def poison(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            first_reading = not torch.is_grad_enabled()
            return output * float("nan") if first_reading and trainer.cluster.rank == 1 else None  # noqa: B023

        handle = trainer.engine.module.anatomy.trunk(trainer.model.lm).embeddings.register_forward_hook(
            poison
        )
        trainer.step(stream.step(0))
        handle.remove()
        no_step, after = step_was_refused(trainer.engine), full_weights(trainer.engine)
        unchanged = all(torch.equal(before[name], weight) for name, weight in after.items())
        trainer.step(stream.step(1))
        found.append((no_step, unchanged, not step_was_refused(trainer.engine)))
        trainer.engine.destroy()
    return found


def test_a_nan_in_the_first_forward_pass_refuses_the_step(world: SmallWorld, tmp_path: Path) -> None:
    cells = [{"stage": stage, "gradient_accumulation_steps": 2} for stage in (0, 2, 3)]
    flags = [flags_of(world, tmp_path / "run", settings) for settings in cells]
    for rank in run_ranks(2, refused, flags):
        assert rank == [(True, True, True)] * len(cells)
