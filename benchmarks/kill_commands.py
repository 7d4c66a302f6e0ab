"""Kill each command at every moment, and give it again: it ends as if nothing had happened.

``python -m benchmarks.kill_commands``: just before each call that changes a file or folder, and in the middle
of writing a file; a new folder for each such moment. Then the same command again has to leave the same bytes
as an undisturbed one, to do nothing anew that was finished, and to remove what the killed one left.
``--commands`` chooses some, ``--most`` draws so many moments of those that have more. ``--measuring`` is how
often training on two ranks is killed between the batches of what it measures before its first step, at
random (``tests/helpers/kill_commands.py``, ``tests/helpers/kills.py``).
"""

import itertools
import random
import tempfile
from pathlib import Path

from benchmarks.common import keep_section, options_of, table

SUMMARY = (
    "Every command given again left the bytes of an undisturbed one, did nothing anew that was finished, "
    "left nothing temporary, and no file was torn in between.\n\n"
)


def main() -> None:
    """Kill commands and measurements, and keep the counts."""
    options = options_of(__doc__, data=False, commands=["all"], most=1000, measuring=40, seed=0)
    from tests.helpers.kill_commands import KilledCommand, commands, make_command_world, more_commands
    from tests.helpers.kills import Soak, measuring  # --help does not wait for torch
    from tests.helpers.small import make_world

    draws = random.Random(options.seed)
    rows = [["command", "moments that there are", "killed", "before a call", "inside a file"]]
    with tempfile.TemporaryDirectory(prefix="kill-commands-") as root:
        folder = Path(root)
        for name in ("world", "commands", "runs", "ewc", "das"):
            (folder / name).mkdir()
        world = make_world(folder / "world")
        Soak(world, folder / "runs").measure()
        command_world = make_command_world(folder / "commands", folder / "runs" / "reference")
        for command in [*commands(command_world), *more_commands(command_world)]:
            if options.commands != ["all"] and command.name not in options.commands:
                continue
            killed = KilledCommand(command, folder / "killed")
            killed.measure()
            faults = killed.faults()
            chosen = faults if len(faults) <= options.most else draws.sample(faults, options.most)
            struck = [fault.how for fault in chosen if killed.survive([fault])]
            counts = (len(faults), len(struck), struck.count("call"), struck.count("bytes"))
            rows.append([command.name, *map(str, counts)])
            print(rows[-1], flush=True)
        for method in ("ewc", "das") if options.measuring else ():
            soak = Soak(world, folder / method, measuring(method, world, folder / method))
            soak.measure()
            count, faults = 0, iter(soak.draw_batch(draws) for _ in itertools.count())
            for number in itertools.count():
                if count >= options.measuring:
                    break
                count += sum(1 for _ in soak.run(f"run-{number}", faults))
            rows.append([f"train --method {method}, between batches", "", str(count), "", ""])
            print(rows[-1], flush=True)
    keep_section("Commands killed and given again", SUMMARY + table(rows))


if __name__ == "__main__":
    main()
