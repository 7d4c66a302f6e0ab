"""A run that is killed 20 times, in the middle of saving too, ends with the same losses and the same model.

The CI-sized form of ``benchmarks/kill_soak.py``.
"""

import itertools
import random
from pathlib import Path

import pytest

from tests.helpers.kills import Outcome, Soak
from tests.helpers.small import make_world

pytestmark = pytest.mark.slow

KILLS = 20
SEED = 5


def test_many_kills(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    soak = Soak(make_world(tmp_path / "world"), tmp_path)
    soak.measure()
    draws, outcomes = random.Random(SEED), list[Outcome]()
    for number in itertools.count():
        if len(outcomes) >= KILLS:
            break
        outcomes += soak.run(f"run-{number}", iter(lambda: soak.draw(draws), None))
    assert {outcome.fault.how for outcome in outcomes} == {"time", "call", "bytes"}
    assert {outcome.fault.victim for outcome in outcomes} == {0, 1, None}
    assert max(outcome.steps_again for outcome in outcomes) < 2 * 2, "a save every two steps"
