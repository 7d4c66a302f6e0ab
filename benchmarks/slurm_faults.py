"""What SLURM does to a job of two nodes, and what it costs: ``python -m benchmarks.slurm_faults``.

Starts a SLURM of two nodes on this machine (Debian's slurm-wlm and munge), submits a run through dga-submit,
and while it trains: the time limit, a requeue by SLURM itself (as for a preemption), the loss of a rank, and
the loss of a node. At the end its losses are compared with those of an uninterrupted run, bit for bit. The
job's log goes to runs/benchmarks/slurm_faults.log.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from benchmarks.common import WORK, keep_section, options_of, table
from tests.helpers.ranks import REPOSITORY, close_pools, run_ranks
from tests.helpers.slurm_cluster import SlurmCluster, job_states, run, wait_until

STEPS = 900
PATIENCE = 900.0
TURN = "resuming from"


def main() -> None:
    """Submit the job, bring the faults about and compare."""
    options_of(__doc__, data=False)
    from tests.helpers.small import make_world  # --help does not wait for torch
    from tests.slurm.test_jobs import SETUP, losses, submit, train_ranks

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "state").mkdir()
        world = make_world(folder)
        flags = [
            f"--ds_config={REPOSITORY / 'ds_configs' / 'zero2.json'}", f"--model={world.model}",
            f"--corpus={world.corpus}", "--method=mlm", f"--max_steps={STEPS}", "--global_batch_size=256",
            "--max_eval_samples=16", "--save_steps=20", "--eval_steps=100000", "--bf16=false",
        ]  # fmt: skip
        os.chdir(folder)
        with SlurmCluster(folder / "state", node_timeout=40) as slurm:
            options = ["--time", "5", "--nodes", "2", "--stop_minutes", "3", *SETUP]
            (number,) = submit(["train", *options, *flags, "--output_dir=run"])
            rows = faults(slurm, number)
            wait_until(lambda: state_now(number) == "COMPLETED", PATIENCE, "end")
            log = job_log(number)
        run_ranks(2, train_ranks, [*flags, f"--output_dir={folder / 'plain'}"], timeout=PATIENCE)
        close_pools()
        same = losses(Path("run")) == losses(Path("plain"))
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / "slurm_faults.log").write_text(log, encoding="utf-8")
    said = (
        f"{STEPS} losses, {'all equal' if same else 'NOT equal'} to an uninterrupted run's, bit for bit. "
        "Not in the seconds: two minutes for which SLURM holds a job back that it has requeued."
    )
    rows = [["fault", "steps done again", "seconds without training"], *rows]
    keep_section("SLURM: faults of a job of two nodes", f"{table(rows)}\n\n{said}")
    sys.exit(not same)


def faults(slurm: SlurmCluster, number: str) -> list[list[str]]:
    """Bring one fault about after the other, and return a row of the table for each."""

    def kill_rank() -> None:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                its = process.environ()
                ours = its.get("SLURM_CONF") == os.environ["SLURM_CONF"] and its.get("SLURM_PROCID") == "1"
                if ours and any(word.endswith("dga-train") for word in process.cmdline()[:2]):
                    process.kill()

    def lose_node() -> None:
        slurm.lose_node("node2")
        time.sleep(5)
        slurm.start_node("node2")

    rows = []
    for name, fault in (
        ("loss of a node", lose_node),
        ("time limit (SIGUSR1 before it)", lambda: None),
        ("requeue by SLURM, as for a preemption", lambda: run("scontrol", "requeue", number)),
        ("kill -9 of a rank", kill_rank),
    ):
        again, seconds = cost(number, fault)
        rows.append([name, str(again), f"{seconds:.0f}"])
        print(rows[-1], flush=True)
    return rows


def cost(number: str, fault: Callable[[], object]) -> tuple[int, float]:
    """Cause a fault during training; return the steps repeated and the seconds until training resumes."""
    turn = job_log(number).count(TURN) + 1
    wait_until(lambda: len(steps(number)) == turn and len(steps(number)[-1]) > 30, PATIENCE, "thirty steps")
    fault()
    last, seen = time.monotonic(), steps(number)[-1]

    def goes_on() -> bool:
        nonlocal last, seen
        turns = steps(number)
        if len(turns) > turn and turns[turn]:
            return True
        if turns[turn - 1] != seen:
            last, seen = time.monotonic(), turns[turn - 1]
        state_now(number)
        return False

    wait_until(goes_on, PATIENCE, "next turn")
    return seen[-1] + 1 - steps(number)[turn][0], time.monotonic() - last


def state_now(number: str) -> str:
    """Return the job's state; one that waits after a requeue is woken."""
    from tests.slurm.test_jobs import wake

    state = next(job_states(number))["JobState"]
    if state == "PENDING":
        with contextlib.suppress(subprocess.SubprocessError):
            wake(number)
            time.sleep(6)
    return state


def job_log(number: str) -> str:
    """Return what the job has printed so far, in all of its turns."""
    path = Path("slurm", f"dga-train-{number}.log")
    return path.read_text(encoding="utf-8") if path.exists() else ""


def steps(number: str) -> list[list[int]]:
    """Return the steps that each turn of the job has logged."""
    turns = job_log(number).split(TURN)
    return [[int(found) for found in re.findall(r"^step (\d+)/", turn, re.MULTILINE)] for turn in turns]


if __name__ == "__main__":
    main()
