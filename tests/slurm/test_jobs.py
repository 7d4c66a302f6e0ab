"""Jobs on a real SLURM, submitted by dga-submit: from text to evaluation, with a requeue on the way."""

import contextlib
import io
import json
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from dga_scale.config.parsing import read_config
from dga_scale.corpus.shards import read_manifest
from dga_scale.errors import UserError
from dga_scale.launch.world import join_cluster
from dga_scale.slurm.cli import main
from dga_scale.train.loop import train
from tests.helpers.ranks import REPOSITORY, run_ranks
from tests.helpers.slurm_cluster import SlurmCluster, job_states, run, wait_until
from tests.helpers.small import SmallWorld, make_world

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]

STEPS = 120
"""So many that a signal after the third comes well before the end on a busy machine too."""
PATIENCE = 400.0
"""Seconds for what takes ten on a quiet machine."""
SEEDS = (1, 2)
# What SLURM calls node1 is this machine; nothing else is told to the ranks.
SETUP = ["--setup", "export MASTER_ADDR=localhost CUDA_VISIBLE_DEVICES="]


def training_flags(model: Path, corpus: Path) -> list[str]:
    return [
        f"--ds_config={REPOSITORY / 'ds_configs' / 'zero2.json'}", f"--model={model}", f"--corpus={corpus}",
        "--method=mlm", f"--max_steps={STEPS}", "--global_batch_size=16", "--max_eval_samples=16",
        "--save_steps=1000", "--bf16=false",
    ]  # fmt: skip


def submit(arguments: list[str]) -> list[str]:
    """Numbers of the jobs that a call of dga-submit started."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(arguments) == 0
    return re.findall(r"^\w+: job (\d+)", printed.getvalue(), flags=re.MULTILINE)


def wake(number: str) -> None:
    """Start a requeued job sooner than after SLURM's two minutes; it must not be in the second of its end."""
    run("scontrol", "update", f"JobId={number}", "StartTime=now+5")


def losses(run_folder: Path) -> list[float]:
    records = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    return [record["loss/total"] for record in records if "loss/total" in record]


def steps_done(run_folder: Path) -> int:
    log = run_folder / "log.jsonl"
    return log.read_text().count('"loss/total"') if log.exists() else 0


def queue_is_empty() -> bool:
    return not run("squeue", "--noheader")


@dataclass(frozen=True)
class Chain:
    """What a chain of jobs left."""

    folder: Path
    world: SmallWorld
    numbers: list[str]

    def logs(self, pattern: str) -> str:
        return "\n".join(path.read_text() for path in sorted((self.folder / "slurm").glob(pattern)))

    def seed_log(self, seed: int) -> str:
        return self.logs(f"dga-train-{self.numbers[1]}_{seed}.log")


@pytest.fixture(scope="module")
def chain(slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """shard (two parts) -> train (two seeds, two nodes each) -> evaluate; seed 1 gets SIGUSR1 on its way."""
    folder = tmp_path_factory.mktemp("the jobs")  # with a space
    world = make_world(tmp_path_factory.mktemp("world"))
    (folder / "suite.yaml").write_text("domain_corpora: [corpora/domain]\nmax_eval_rows: 16\n")
    runs = folder / "runs" / "mine"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        numbers = submit([
            "--cpus_per_task", "1", "--time", "10",
            "shard", str(world.domain_text), "--tokenizer", str(world.model), "--output", "corpora/domain",
            "--sequence_length", "32", "--validation_share", "0.1", "--array_tasks", "2",
            "--array_task_patience", "5",
            "--then", "train", "--nodes", "2", "--seeds", "1,2", *SETUP,
            *training_flags(world.model, Path("corpora/domain")), "--output_dir", "runs/mine",
            "--then", "evaluate", "--base", str(world.model), "--model",
            *(f"mine=runs/mine/seed-{seed}/model" for seed in SEEDS),
            "--suite", "suite.yaml", "--output_dir", "evaluation",
        ])  # fmt: skip
    number = f"{numbers[1]}_1"
    chain = Chain(folder, world, numbers)
    wait_until(lambda: steps_done(runs / "seed-1") >= 3 or queue_is_empty(), PATIENCE, "third step of seed 1")
    assert not queue_is_empty(), chain.seed_log(1)
    run("scancel", "--signal=USR1", number)
    wait_until(
        lambda: run("squeue", "--noheader", "--format=%t", f"--jobs={number}") == "PD", PATIENCE, "requeue"
    )
    wake(number)
    wait_until(queue_is_empty, PATIENCE, "end of the chain")
    return chain


def test_every_job_of_a_chain_ends_well(chain: Chain) -> None:
    assert len(chain.numbers) == 3
    for number in chain.numbers:
        for job in job_states(number):
            assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), chain.logs(
                f"{job['JobName']}*.log"
            )


def test_parts_of_an_array_make_the_corpus_of_one_process(chain: Chain) -> None:
    ours, theirs = (read_manifest(path) for path in (chain.folder / "corpora" / "domain", chain.world.corpus))
    assert [shard.sha256 for shard in ours.shards] == [shard.sha256 for shard in theirs.shards]


def train_ranks(flags: list[str]) -> int:
    return train(read_config(flags), join_cluster())


@pytest.mark.parametrize("seed", SEEDS)
def test_losses_are_those_of_a_plain_run_bit_for_bit(chain: Chain, tmp_path: Path, seed: int) -> None:
    """Seed 2 ran through; seed 1 was stopped by the signal, requeued, and resumed."""
    flags = training_flags(chain.world.model, chain.folder / "corpora" / "domain")
    assert run_ranks(2, train_ranks, [*flags, f"--seed={seed}", f"--output_dir={tmp_path / 'run'}"]) == [0, 0]
    found = losses(chain.folder / "runs" / "mine" / f"seed-{seed}")
    assert len(found) == STEPS
    assert found == losses(tmp_path / "run")
    environment = json.loads(
        (chain.folder / "runs" / "mine" / f"seed-{seed}" / "environment.json").read_text()
    )
    assert environment["launcher"] == "srun"


def test_the_signal_led_to_one_requeue_and_one_log(chain: Chain) -> None:
    log = chain.seed_log(1)
    assert len(re.findall(r"stopped after step \d+ as asked", log)) == 1
    assert log.index("requeued, the next turn") < log.index(f"step {STEPS}/{STEPS}")
    assert "as asked" not in chain.seed_log(2)
    restarts = {job["ArrayTaskId"]: job["Restarts"] for job in job_states(chain.numbers[1])}
    assert restarts == {"1": "1", "2": "0"}


def test_the_evaluation_saw_both_seeds(chain: Chain) -> None:
    result = json.loads((chain.folder / "evaluation" / "results.json").read_text())
    assert len(result["models"]["mine"]["domain_loss"]["values"]) == len(SEEDS)


def test_a_cancelled_job_saves_and_does_not_come_back(
    slurm: SlurmCluster, chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of the template, edited by hand: scancel, like a preemption, sends SIGTERM and waits a while."""
    monkeypatch.chdir(tmp_path)
    text = (REPOSITORY / "launchers" / "slurm" / "dga_train.sbatch").read_text()
    flags = [*training_flags(chain.world.model, chain.world.corpus), "--output_dir=run"]
    for old, new in (
        ("#SBATCH --gres=gpu:8\n#SBATCH --cpus-per-task=8\n", "#SBATCH --cpus-per-task=1\n"),
        ("--cpus-per-task=8", "--cpus-per-task=1"),
        ("ntasks-per-node=8", "ntasks-per-node=1"),
        ("time=24:00:00", "time=10"),
        ("#SBATCH --account=ACCOUNT\n", ""),
        ('"$PWD"/.venv', sys.prefix),
        ("set -euo pipefail\n", f"{SETUP[1]}\nset -euo pipefail\n"),
        (text[text.index("--ds_config") : text.index(" || code")], shlex.join(flags)),
    ):
        assert old in text
        text = text.replace(old, new)
    Path("mine.sbatch").write_text(text)
    Path("slurm").mkdir()
    number = run("sbatch", "--parsable", "mine.sbatch")
    wait_until(lambda: steps_done(Path("run")) >= 3 or queue_is_empty(), PATIENCE, "third step")
    run("scancel", number)
    wait_until(queue_is_empty, PATIENCE, "end")
    log = Path("slurm", f"dga-train-{number}.log").read_text()
    assert "as asked; the same command resumes" in log
    (job,) = job_states(number)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    latest = Path("run", "checkpoints", "latest").read_text().strip()
    assert latest == f"step-{steps_done(Path('run')):06d}"


def test_a_request_that_no_node_can_meet_is_refused_with_slurms_words(
    slurm: SlurmCluster, chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything of the chain is submitted."""
    monkeypatch.chdir(tmp_path)
    flags = [*training_flags(chain.world.model, chain.world.corpus), "--output_dir", "runs/mine"]
    first = ["shard", str(chain.world.domain_text), "--tokenizer", str(chain.world.model), "--output", "c"]
    for options, words in (
        (["--nodes", "4"], "More processors requested|node configuration is not available|Node count"),
        (["--partition", "gpu"], "invalid partition"),
    ):
        with pytest.raises(UserError, match=f"train: SLURM would not run this job. SLURM says: .*({words})"):
            main([*first, "--then", "train", *options, *flags])
    assert queue_is_empty()
    assert os.listdir(tmp_path) == []
