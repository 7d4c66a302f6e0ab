"""Kill launchers at random moments, and launch runs twice: nothing lost, no orphan, one owner.

``python -m benchmarks.launch_soak --kills 100 --twice 100``: the launchers are those of ``--launchers``, in
turn ("forked" is one of our own, whose ranks start at once; srun needs SLURM's daemons). After each kill the
same command is given at once. Each run has to end with the losses, bit for bit, and the model (sha256) of a
run that nobody disturbed; of two launches one is refused and names the other. Stops at the first run that is
not so. With --minutes no run begins after so many.
"""

import contextlib
import itertools
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.common import keep_section, options_of, table

if TYPE_CHECKING:
    from tests.helpers.launches import Killed

LAUNCHERS = ["forked", "deepspeed", "torchrun", "mpirun"]


def main() -> None:
    """Kill so many launchers, of each so many, and launch so many runs twice."""
    options = options_of(
        __doc__, data=False, kills=100, twice=100, launchers=LAUNCHERS, seed=0, minutes=float("inf")
    )
    from tests.helpers.kills import Soak  # --help does not wait for torch
    from tests.helpers.launches import Started, kills, twice
    from tests.helpers.slurm_cluster import SlurmCluster
    from tests.helpers.small import make_world

    began, draws = time.monotonic(), random.Random(options.seed)
    launched_twice, refused, killed = list[str](), list[str](), list["Killed"]()
    with contextlib.ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="launch-soak-")))
        (folder / "world").mkdir()
        soak = Soak(make_world(folder / "world"), folder)
        soak.measure()
        if "srun" in options.launchers:
            (folder / "slurm").mkdir()
            held.enter_context(SlurmCluster(folder / "slurm"))

        def names(kind: str, found: Sized, wanted: int) -> Iterator[str]:
            for number in itertools.count(1):
                if len(found) >= wanted or time.monotonic() - began > 60 * options.minutes:
                    return
                yield f"{kind}-{number}"
                shutil.rmtree(folder / f"{kind}-{number}")

        for name in names("twice", refused, options.twice):
            launched_twice.append(name)
            refused += [name] if twice(soak, name, draws) else []
            print(name, len(refused), file=sys.stderr, flush=True)
        for launcher in options.launchers:
            start = time.monotonic()
            whole = Started(launcher, soak.flags(folder / launcher), folder / launcher, folder / "log")
            assert whole.wait(600.0) == 0, whole.output()
            seconds, found = time.monotonic() - start, list["Killed"]()
            for name in names(launcher, found, options.kills):
                for kill in kills(soak, launcher, name, seconds, draws):
                    found.append(kill)
                    print(len(found), kill, file=sys.stderr, flush=True)
            killed += found
    title = "Launchers killed, and runs launched twice"
    keep_section(title, summary(killed, len(launched_twice), len(refused)))


def summary(killed: "list[Killed]", launched_twice: int, refused: int) -> str:
    """Say what was tried; a run that does not survive ends the soak."""
    head = ["process killed", "times", "last rank ended after, median (largest)", "next launch refused"]
    rows = [[*head, "steps again"]]
    for launcher, process in dict.fromkeys((each.launcher, each.process) for each in killed):
        found = [each for each in killed if (each.launcher, each.process) == (launcher, process)]
        seconds = [each.seconds_to_end for each in found]
        rows.append(
            [
                f"{launcher}: {process}",
                str(len(found)),
                f"{statistics.median(seconds):.1f} s ({max(seconds):.1f} s)",
                str(sum(each.refused for each in found)),
                f"{statistics.mean(each.steps_again for each in found):.2f}",
            ]
        )
    return (
        f"{launched_twice} runs launched twice at a random time: {refused} times one of both was refused "
        "with one line that names the other, else the first had ended. "
        f"{len(killed)} launchers killed, and the same command given at once: no rank lived on, none wrote "
        "beside another. Every run ended with the losses of an undisturbed one in every bit, the same model "
        "and no temporary file.\n\n" + table(rows)
    )


if __name__ == "__main__":
    main()
