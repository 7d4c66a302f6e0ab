"""What is killed and started again ends as if nothing had happened: runs, measurements, all other commands.

The CI-sized form of ``benchmarks/kill_soak.py`` and ``benchmarks/kill_commands.py``.
"""

import itertools
import random
from pathlib import Path

import pytest

from tests.helpers.kill_commands import NAMES, CommandWorld, KilledCommand, commands, make_command_world
from tests.helpers.kills import Fault, Outcome, Soak, measuring
from tests.helpers.small import SmallWorld

pytestmark = pytest.mark.slow

KILLS = 20
SEED = 5
NEVER = Fault("call", 0, 10**9)


@pytest.fixture(scope="module")
def soak(world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Soak:
    """Runs of which one has ended."""
    soak = Soak(world, tmp_path_factory.mktemp("soak"))
    soak.measure()
    return soak


@pytest.fixture(scope="module")
def command_world(soak: Soak, tmp_path_factory: pytest.TempPathFactory) -> CommandWorld:
    return make_command_world(tmp_path_factory.mktemp("commands"), soak.folder / "reference")


def test_many_kills(soak: Soak) -> None:
    draws, outcomes = random.Random(SEED), list[Outcome]()
    for number in itertools.count():
        if len(outcomes) >= KILLS:
            break
        outcomes += soak.run(f"run-{number}", iter(lambda: soak.draw(draws), None))
    assert {outcome.fault.how for outcome in outcomes} == {"time", "call", "bytes"}
    assert {outcome.fault.victim for outcome in outcomes} == {0, 1, None}
    assert max(outcome.steps_again for outcome in outcomes) < 2 * 2, "a save every two steps"


@pytest.mark.parametrize(
    ("method", "faults"),
    [
        # Ranks ask whether to stop at first, in each batch of head (4), Fisher (4) or importance (2), and
        # before they train: then all is measured, but for the importance after the last step.
        ("ewc", [("batch", 1, 3), ("batch", None, 8), ("batch", 0, 6)]),
        ("das", [("batch", None, 3), ("batch", 1, 4), ("batch", 0, 4)]),
    ],
)
def test_kills_while_measuring(
    method: str, faults: list[tuple[str, int | None, int]], world: SmallWorld, tmp_path: Path
) -> None:
    soak = Soak(world, tmp_path, measuring(method, world, tmp_path))
    soak.measure()
    outcomes = list(soak.run("run", itertools.chain((Fault(*fault) for fault in faults), [NEVER])))
    assert [outcome.fault for outcome in outcomes] == [Fault(*fault) for fault in faults]


@pytest.mark.parametrize("name", NAMES)
def test_killed_commands(name: str, command_world: CommandWorld, tmp_path: Path) -> None:
    (command,) = (each for each in commands(command_world) if each.name == name)
    killed = KilledCommand(command, tmp_path)
    killed.measure()
    faults = random.Random(SEED).sample(killed.faults(), 3)
    assert killed.survive(faults)
