"""Kill runs on two ranks at random moments, in the middle of saving too, and launch them until they end.

``python -m benchmarks.kill_soak --kills 500``: each run has to end with the losses, bit for bit, and the
model (sha256) of a run that nobody disturbed, and leave no temporary file. Prints a table of what was tried
(``tests/helpers/kills.py`` says what the faults are), and stops at the first run that is not so. With
--minutes no run begins after so many; --zero is ZeRO's stage, --seed that of the moments.
"""

import itertools
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.common import keep_section, options_of, table

if TYPE_CHECKING:
    from tests.helpers.kills import Outcome, Soak

NAMES = {
    "time": "kill -9 at a random time",
    "call": "kill -9 before a random call that changes the folder",
    "bytes": "killed in the middle of writing a file",
    "stop": "SIGSTOP for good at a random time",
}


def main() -> None:
    """Kill runs until so many faults have struck."""
    options = options_of(
        __doc__, data=False, kills=500, seed=0, zero=2, async_save=False, minutes=float("inf")
    )
    from tests.helpers.kills import Soak  # --help does not wait for torch
    from tests.helpers.small import make_world

    outcomes, began = [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill-soak-") as root:
        folder = Path(root)
        (folder / "world").mkdir()
        settings = {"ds_config": f"ds_configs/zero{options.zero}.json", "async_save": options.async_save}
        soak = Soak(make_world(folder / "world"), folder, settings)
        soak.measure()
        draws, runs, first = random.Random(options.seed), 0, time.monotonic()
        for runs in itertools.count(1):
            name = f"run-{runs}"
            for outcome in soak.run(name, iter(lambda: soak.draw(draws, stops=True), None)):
                outcomes.append(outcome)
                print(len(outcomes), outcome, file=sys.stderr, flush=True)
            shutil.rmtree(folder / name)
            if len(outcomes) >= options.kills or time.monotonic() - began > 60 * options.minutes:
                break
    lost = (time.monotonic() - first - runs * soak.seconds) / len(outcomes)
    keep_section("Runs killed and launched again", summary(outcomes, runs, soak, lost))


def summary(outcomes: "list[Outcome]", runs: int, soak: "Soak", lost: float) -> str:
    """Say what was tried, by kind of fault and victim; a run that does not survive ends the soak."""
    rows = [["fault", "victim", "times", "others ended after, median (largest)", "steps again"]]
    for how, victim in itertools.product(NAMES, (0, 1, None)):
        found = [o for o in outcomes if (o.fault.how, o.fault.victim) == (how, victim)]
        if not found:
            continue
        met = [o.seconds_to_end for o in found if o.met and victim is not None]
        ended = f"{statistics.median(met):.2f} s ({max(met):.2f} s)" if met else ""
        again = statistics.mean(o.steps_again for o in found)
        who = "all" if victim is None else f"rank {victim}"
        rows.append([NAMES[how], who, str(len(found)), ended, f"{again:.2f}"])
    early = sum(not o.met for o in outcomes)
    return (
        f"{len(outcomes)} faults in {runs} runs of {len(soak.reference)} steps with a save every second "
        "step. Every run ended with the losses of an undisturbed one in every bit, the same model and no "
        f"temporary file. {early} faults struck before the ranks had met, where the launcher has to end "
        f"the others. Lost per fault: {lost:.1f} s, where an undisturbed run takes {soak.seconds:.1f} s, "
        "most of it to start.\n\n" + table(rows)
    )


if __name__ == "__main__":
    main()
