"""One run on 4, then 2, then 1, then 3 ranks, held against a run that was never interrupted.

What has to agree, and to what: samples, their order and their masks exactly; losses, weights and Adam's
moments to what the order of sums in fp32 does to them over eight steps. A contrast is taken among the rows of
one micro-batch of all ranks, here the whole global batch on any number of them; with more than one, it would
be among the rows of each. Dropout is drawn on each rank, so runs on other numbers of ranks draw otherwise,
which is no error but can't be compared: where a method needs dropout, its probability here is 1e-12.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dga_scale.backbone.weights_hash import weights_hash
from dga_scale.checkpoint.store import newest_verified
from dga_scale.config.parsing import read_config
from dga_scale.corpus.cli import main as shard
from dga_scale.errors import UserError
from dga_scale.launch.preemption import EXIT_STOPPED
from dga_scale.launch.world import single_process
from dga_scale.preservation.importance import Importance
from dga_scale.storage.safetensors_stream import SegmentReader
from dga_scale.train.callbacks import ProtectUnits, RunState
from dga_scale.train.inputs import check_inputs
from dga_scale.train.trainer import Trainer
from tests.helpers.batches import contents
from tests.helpers.forks import launch
from tests.helpers.ranks import REPOSITORY
from tests.helpers.small import SmallWorld
from tests.test_train import arguments, around_steps, losses, run_until

pytestmark = pytest.mark.slow

STEPS, ROWS = 8, 12
MANY, FEW = ((4, 2), (2, 4), (1, 6), (3, STEPS)), ((2, 4), (3, STEPS))
"""Ranks, and the step after which they stop, asked by a signal to one of them."""

LOSS = 1e-5
"""Losses of about 6 may differ by so much: some units of their last place in fp32, 5e-7."""
OF_THE_LARGEST = 3e-5
"""So much of the largest weight, or moment, of all may one of them differ: 3e-6, with EWC's pull 8e-6."""

OWN: dict[str, dict[str, Any]] = {
    "mlm": {},
    "dga": {"dropout": 1e-12, "soft_mask": "update"},
    "lora": {},
    "ewc": {"fisher_samples": 16, "ewc_weight": 5.0},
    "cse": {"cse_samples": 64, "cse_projection": 8, "cse_layers": 1},
}
Samples = dict[str, list[list[int]]]
"""By step: rows of the global batch in their order, each with a hash of its masked tokens."""


def flags_of(world: SmallWorld, run: Path, method: str, stage: int, **settings: Any) -> list[str]:
    own = {"dropout": 0.0, "method": method} | OWN[method] | settings
    if method == "mlm":
        own["corpus"] = documents_of(world)
    if method == "ewc":
        own["general_corpus"] = world.general_corpus
    if method == "cse":
        own["mix"] = f"{world.general_corpus}:0.3"
    return arguments(
        world, run, ds_config=REPOSITORY / "ds_configs" / f"zero{stage}.json", max_steps=STEPS + 1,
        global_batch_size=ROWS, general_eval_corpus=None, max_eval_samples=12, eval_steps=100,
        save_steps=100, protection_steps=100, check_invariants=1, **own,
    )  # fmt: skip


def documents_of(world: SmallWorld) -> Path:
    """The domain's text packed by document: rows of 22 to 61 tokens, which are sorted and read in groups."""
    folder = world.corpus.with_name("documents")
    if not folder.exists():
        shard([str(world.domain_text), "--tokenizer", str(world.model), "--sequence_length", "64",
               "--packing", "document", "--validation_share", "0.1", "--num_workers", "1",
               "--output", str(folder)])  # fmt: skip
    return folder


def leg(flags: list[str], stop_after: int, importance: Path, folder: Path) -> int:
    """Train until ``stop_after`` steps are done; DGA's importance is given, as proxy KL needs dropout."""
    rank, seen, on_start = os.environ["RANK"], {}, ProtectUnits.on_start

    @contextlib.contextmanager
    def listening(trainer: Trainer, batches: Any) -> Iterator[None]:
        seen[batches.step] = [
            [(row, hash(tuple(masked_ids))) for (_, row), (_, masked_ids, _) in contents(batch).items()]
            for batch in batches.micro_batches
        ]
        yield

    def with_importance(self: ProtectUnits, run: RunState) -> None:
        run.cluster.run_on_first(lambda: shutil.copy(importance, run.inputs.folder.importance))
        on_start(self, run)

    ProtectUnits.on_start = with_importance  # type: ignore[method-assign]
    with around_steps(listening):
        code = run_until(flags, stop_after - 2, 0)  # a signal in one step ends the next
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    return code


def trained(ranks: int, stop_after: int, flags: list[str], importance: Path, folder: Path) -> Samples:
    """Run a leg; each step's samples in the order of the global batch.

    Chunks: that of micro-batches and ranks. Documents: one, whose sorted rows the ranks take in turn.
    """
    folder.mkdir(parents=True)
    launched = launch(ranks, leg, flags, stop_after, importance, folder)
    codes = launched.wait(600)
    assert codes == [EXIT_STOPPED] * ranks, [launched.output(rank)[-2000:] for rank in range(ranks)]
    seen = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    if any(flag.endswith("/documents") for flag in flags):
        return {
            step: [row for turn in zip(*(own[step][0] for own in seen), strict=True) for row in turn]
            for step in seen[0]
        }
    return {
        step: [
            row for each in zip(*(own[step] for own in seen), strict=True) for rows in each for row in rows
        ]
        for step in seen[0]
    }


def final_state(run: Path) -> tuple[dict[str, Tensor], set[str]]:
    """Weights, buffers and moments of the last checkpoint, and Adam's number of steps."""
    checkpoint = newest_verified(run, single_process())
    assert checkpoint is not None
    assert checkpoint.step == STEPS
    with SegmentReader(checkpoint.shards) as reader:
        state = {key: reader.full(key) for key in reader.stored}
        return state, {metadata["optimizer_step"] for metadata in reader.metadata}


@pytest.fixture(scope="module")
def importance(world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("importance") / "importance.safetensors"
    base = weights_hash(str(world.model), random_init=False)
    Importance({"heads": torch.rand(2, 4)}, {"base_model": base}).save(path)
    return path


@pytest.fixture(scope="module")
def straight(world: SmallWorld, importance: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs on two ranks that are not interrupted: folder and samples; made when they are asked for."""

    @functools.cache
    def of(method: str) -> tuple[Path, Samples]:
        folder = tmp_path_factory.mktemp("straight")
        flags = flags_of(world, folder / "run", method, 2)
        return folder / "run", trained(2, STEPS, flags, importance, folder / "seen")

    return of


@pytest.mark.parametrize(
    ("method", "stage", "legs"),
    [
        ("mlm", 2, MANY), ("dga", 1, MANY), ("dga", 2, MANY), ("dga", 3, MANY),
        ("lora", 2, FEW), ("ewc", 3, FEW), ("cse", 2, FEW),
    ],
)  # fmt: skip
def test_a_run_changes_its_number_of_ranks(
    method: str,
    stage: int,
    legs: tuple[tuple[int, int], ...],
    world: SmallWorld,
    importance: Path,
    straight: Any,
    tmp_path: Path,
) -> None:
    run, samples = tmp_path / "run", {}
    for ranks, stop_after in legs:
        flags = flags_of(world, run, method, stage)
        samples |= trained(ranks, stop_after, flags, importance, tmp_path / f"seen-{ranks}")
    whole, expected = straight(method)
    assert samples == expected
    assert losses(run) == pytest.approx(losses(whole), abs=LOSS)
    assert len(losses(run)) == STEPS
    (state, steps), (other, other_steps) = final_state(run), final_state(whole)
    assert steps == other_steps == {str(float(STEPS))}
    assert state.keys() == other.keys()
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        names = [name for name in state if name.startswith(f"{kind}:")]
        largest = max(other[name].abs().max().item() for name in names)
        apart = {name: (state[name] - other[name]).abs().max().item() / largest for name in names}
        assert max(apart.values()) < OF_THE_LARGEST, max(apart, key=apart.__getitem__)


def test_ranks_that_do_not_divide_the_batch_are_told_which_do(world: SmallWorld, tmp_path: Path) -> None:
    config = read_config(arguments(world, tmp_path / "run", method="mlm", global_batch_size=16))
    three = dataclasses.replace(single_process(), world_size=3)
    with pytest.raises(
        UserError, match=r"16 rows does not divide into 1 micro-batches on each of 3.* start 2 or 4 ranks"
    ):
        check_inputs(config, three)
