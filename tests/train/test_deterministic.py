"""--deterministic: torch's state in a real rank, the numbers on CPUs, and what has no such implementation.

No test here has a GPU: what the flag is for is measured by ``python -m benchmarks.gpu``.
"""

import os
from pathlib import Path

import pytest
import torch
import yaml

from dga_scale.config.parsing import read_config
from dga_scale.errors import UserError
from dga_scale.launch.determinism import check_attention, deterministic
from dga_scale.launch.environment import read_launch_info
from dga_scale.launch.launcher_watch import LauncherWatch
from dga_scale.launch.world import join_cluster, single_process
from dga_scale.train.callbacks import Callback, RunState
from dga_scale.train.cli import _train_as_rank
from dga_scale.train.inputs import check_inputs
from dga_scale.train.loop import train
from tests.helpers.forks import launch
from tests.helpers.pictures import no_pictures
from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.small import SmallWorld
from tests.test_train import arguments, losses

VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "FLASH_ATTENTION_DETERMINISTIC")
State = tuple[object, ...]


def state() -> State:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )


class Recorder(Callback):
    """Remembers the state after each step; calls ``then``."""

    def __init__(self) -> None:
        self.seen: set[State] = set()

    def after_step(self, run: RunState) -> None:
        self.seen.add(state())


class Putting(Callback):
    def after_step(self, run: RunState) -> None:
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))


def flags_of(world: SmallWorld, run: Path, wanted: bool) -> list[str]:
    return arguments(
        world, run, deterministic=wanted, method="dga", soft_mask="update", importance_samples=16,
        max_steps=3, max_eval_samples=16, dropout=0.1, general_eval_corpus=None,
    )  # fmt: skip


def watched(flags: list[str]) -> tuple[set[State], State]:
    recorder = Recorder()
    with no_pictures():
        train(read_config(flags), join_cluster(), [recorder])
    return recorder.seen, state()


def putting(flags: list[str]) -> int:
    return train(read_config(flags), join_cluster(), [Putting()])


def test_a_run_computes_deterministically_and_on_a_cpu_the_same(world: SmallWorld, tmp_path: Path) -> None:
    before = state()
    for wanted in (False, True):
        run = tmp_path / str(wanted)
        for seen, after in run_ranks(2, watched, flags_of(world, run, wanted)):
            assert seen == {(True, True, False) if wanted else before}
            assert after == before
        assert yaml.safe_load((run / "config.yaml").read_text())["deterministic"] is wanted
    assert losses(tmp_path / "True") == losses(tmp_path / "False")
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("True", "False")]
    one, other = (path.read_bytes() for path in files)
    assert one == other


def test_an_operation_that_has_no_such_implementation_is_named(world: SmallWorld, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"--deterministic true: torch has no .* of put_ on this") as error:
        run_ranks(1, putting, flags_of(world, tmp_path / "run", True))
    assert error.value.errors[0][0] == "UserError"


def joining(flags: list[str]) -> int:
    """What ``dga-train`` does on a rank, as far as the process group."""
    from dga_scale.launch import world

    def started(*_: object) -> None:
        raise SystemExit(10 + torch.are_deterministic_algorithms_enabled() + (VARIABLES[1] in os.environ))

    world._start_group = started
    return _train_as_rank(lambda: read_config(flags), LauncherWatch(read_launch_info(os.environ)))


@pytest.mark.parametrize("wanted", [True, False])
def test_it_does_so_before_communication_starts(wanted: bool, world: SmallWorld, tmp_path: Path) -> None:
    """NCCL reads its variables when it starts."""
    launched = launch(1, joining, flags_of(world, tmp_path / "run", wanted))
    assert launched.wait() == [12 if wanted else 10]


def test_variables_are_those_that_the_libraries_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "another")
    with deterministic(False):
        assert {os.environ[name] for name in VARIABLES} == {"another"}
    with deterministic(True):
        assert [os.environ[name] for name in VARIABLES] == [":4096:8", "another", "1"]
    monkeypatch.setenv(VARIABLES[0], ":16:8")
    monkeypatch.delenv(VARIABLES[1])
    with deterministic(True):
        assert [os.environ[name] for name in VARIABLES] == [":16:8", "^NVLS", "1"]


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="another"), deterministic(True):
        raise RuntimeError("another")


def test_attention_that_may_differ_is_refused(world: SmallWorld, tmp_path: Path) -> None:
    for implementation in (None, "sdpa", "eager", "flash_attention_2"):
        check_attention(implementation)
    flags = [*flags_of(world, tmp_path / "run", True), "--attn_implementation=flex_attention"]
    with pytest.raises(UserError, match=r"--attn_implementation flex_attention is not known .*sdpa, eager"):
        check_inputs(read_config(flags), single_process())
