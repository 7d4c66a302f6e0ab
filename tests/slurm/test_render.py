"""What a rendered script says, and what is refused before there is one. No SLURM is needed."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from dga_scale.errors import UserError
from dga_scale.slurm.cli import build_parser, main, parse_chain
from dga_scale.slurm.options import JobOptions, seconds
from dga_scale.slurm.render import render
from dga_scale.slurm.stages import Job
from tests.helpers.flags import changed
from tests.helpers.ranks import REPOSITORY
from tests.helpers.small import SmallWorld, make_world

ZERO2 = str(REPOSITORY / "ds_configs" / "zero2.json")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    return make_world(tmp_path_factory.mktemp("a world"))  # with a space in its paths


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def train(world: SmallWorld, *more: str) -> list[str]:
    return changed([
        "train", "--ds_config", ZERO2, "--model", str(world.model), "--corpus", str(world.corpus),
        "--method", "mlm", "--output_dir", "runs/mine",
    ], *more)  # fmt: skip


def shard(world: SmallWorld, *more: str) -> list[str]:
    return ["shard", str(world.domain_text), "--tokenizer", str(world.model), "--output", "new", *more]


def scripts(arguments: Sequence[str]) -> list[str]:
    """The scripts, each found to be good bash."""
    texts = [render(job) for job in parse_chain(arguments)[0]]
    for text in texts:
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    return texts


def directives(script: str) -> dict[str, str]:
    return dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in script.splitlines()
                if line.startswith("#SBATCH"))  # fmt: skip


def step(script: str) -> list[str]:
    """The words of the script's srun as bash takes them, in task 7 of an array."""
    text = script[script.index("srun ") :].split("|| code")[0].split("\n\n")[0]
    printed = subprocess.run(
        ["bash", "-c", f"srun() {{ printf '%s\\0' \"$@\"; }}; {text}"],
        env={"SLURM_ARRAY_TASK_ID": "7", "PWD": "/where it runs"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return printed.stdout.split("\0")[:-1]


def test_training_asks_for_what_the_options_say(world: SmallWorld):
    options = (
        "--nodes 4 --gpus_per_node h100:8 --cpus_per_task 12 --time 1-00:00:00 --account proj --qos high"
    )
    more = ["--sbatch", "constraint=ib", "--sbatch", "exclusive", "--stop_minutes", "10"]
    (script,) = scripts([*options.split(), "--partition", "train", *train(world, *more)])
    found = directives(script)
    assert found == {
        "job-name": "dga-train", "nodes": "4", "ntasks-per-node": "8", "gres": "gpu:h100:8",
        "cpus-per-task": "12", "time": "1-00:00:00", "account": "proj", "partition": "train", "qos": "high",
        "output": "slurm/%x-%j.log", "open-mode": "append", "requeue": "", "signal": "USR1@600",
        "constraint": "ib", "exclusive": "",
    }  # fmt: skip
    words = step(script)
    assert words[:5] == [
        "--mpi=none",
        "--kill-on-bad-exit=0",
        "--wait=60",
        "--cpus-per-task=12",
        "dga-train",
    ]
    assert words[5:] == train(world)[1:]  # the paths with spaces too, and nothing of the job's options
    assert f"export PATH={sys.prefix}/bin:$PATH" in script


def test_directives_stand_before_the_first_command(world: SmallWorld):
    """SLURM reads none after it."""
    (script,) = scripts(train(world, "--setup", "module load cuda"))
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert lines[first] == "module load cuda"
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]


@pytest.mark.parametrize(
    ("code", "saved", "requeued"),
    [(0, True, False), (75, False, True), (138, False, True), (1, True, False), (2, True, False),
     (76, True, True), (76, False, False), (137, True, True), (137, False, False)],
)  # fmt: skip
def test_which_ends_lead_back_into_the_queue(world: SmallWorld, code: int, saved: bool, requeued: bool):
    """A signal always; the loss of a rank where a checkpoint was written since the turn began."""
    (script,) = scripts(train(world))
    latest = Path("runs", "mine", "checkpoints", "latest")
    latest.parent.mkdir(parents=True)
    latest.write_text("step-000002\n")
    save = f"echo step-000004 > {latest}; " if saved else ""
    stand_ins = f'srun() {{ {save}return {code}; }}; scontrol() {{ echo "scontrol $*"; }}\n'
    environment = {"SLURM_JOB_ID": "12", "PATH": os.environ["PATH"]}
    result = subprocess.run(
        ["bash", "-c", stand_ins + script], env=environment, capture_output=True, text=True
    )
    assert result.returncode == code
    assert ("scontrol requeue 12" in result.stdout) == requeued


def test_a_chain_and_its_arrays(world: SmallWorld, capsys: pytest.CaptureFixture[str]):
    """Later jobs may read what earlier ones have yet to write."""
    Path("suite.yaml").write_text("domain_corpora: [new]\n")
    arguments = [
        "--account", "proj", *shard(world, "--array_tasks", "8", "--cpus_per_task", "3"),
        "--then", *train(world, "--seeds", "1-3,7%2", "--corpus", "new", "--output_dir", "runs/my run"),
        "--then", "evaluate", "--base", str(world.model), "--model", "runs/my run/seed-7/model",
        "--suite", "suite.yaml", "--output_dir", "evaluation",
    ]  # fmt: skip
    assert main([*arguments, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    first, second, third = scripts(arguments)
    assert all(f"{script}\n" in printed for script in (first, second, third))
    assert printed.count("sbatch --dependency=afterok:JOB_OF_") == 2
    assert not Path("slurm").exists()
    assert (directives(first)["array"], directives(first)["output"]) == ("0-7", "slurm/%x-%A_%a.log")
    assert step(first)[-2:] == ["--num_workers=3", "--array_task=7/8"]
    assert directives(second)["array"] == "1-3,7%2"
    assert step(second)[-2:] == ["--seed=7", "--output_dir=runs/my run/seed-7"]
    assert "array" not in directives(third)
    assert "signal" not in directives(first) | directives(third)
    assert all(directives(script)["account"] == "proj" for script in (first, second, third))


def test_containers(world: SmallWorld, tmp_path: Path):
    (tmp_path / "image.sif").touch()
    (tmp_path / "big data").mkdir()
    data = str(tmp_path / "big data")
    gpus = ["--gpus_per_node", "2", "--mounts", data]
    (script,) = scripts(["--container", "image.sif", *gpus, *train(world)])
    here, words = str(tmp_path), step(script)
    inside = words.index("dga-train")
    assert words[3:inside] == [
        "apptainer",
        "exec",
        "--nv",
        "--pwd",
        here,
        "--bind",
        f"{here},{data}",
        "image.sif",
    ]
    (script,) = scripts(train(world, "--container", "nvcr.io#nvidia/pytorch:25.09-py3", *gpus))
    words = step(script)
    assert words[3 : words.index("dga-train")] == [
        "--container-image=nvcr.io#nvidia/pytorch:25.09-py3", f"--container-workdir={here}",
        f"--container-mounts={here}:{here},{data}:{data}",
    ]  # fmt: skip
    assert sys.prefix not in script


def test_the_template_for_editing_by_hand_is_what_is_rendered():
    """launchers/slurm/dga_train.sbatch: its own words at the top, then the script of a usual job."""
    text = (REPOSITORY / "launchers" / "slurm" / "dga_train.sbatch").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines(keepends=True) if not re.match(r"## |##$", line)]
    arguments = (
        "--ds_config ds_configs/zero2.json --model FacebookAI/roberta-base --corpus corpora/domain "
        "--general_eval_corpus corpora/general/validation --output_dir runs/mine --soft_mask update"
    )
    options = JobOptions(
        nodes=2, gpus_per_node="8", cpus_per_task=8, time="24:00:00", account="ACCOUNT", venv=".venv"
    )
    assert "".join(lines) == render(
        Job("train", options, ("dga-train", *shlex.split(arguments)), "", "runs/mine")
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 5400), ("1:30", 90), ("12:00:00", 43200), ("2-12", 216000), ("1-00:30", 88200),
     ("1-00:00:01", 86401), ("12h", None), ("", None), ("1:2:3:4", None)],
)  # fmt: skip
def test_times_as_slurm_writes_them(text: str, expected: int | None):
    assert seconds(text) == expected


REFUSED = [
    ("train", ["--time", "2 days"], "--time 2 days: write minutes"),
    ("train", ["--nodes", "0"], "--nodes 0: must be at least 1"),
    ("train", ["--gpus_per_node", "all"], "--gpus_per_node all: write a number"),
    ("train", ["--seeds", "1-"], "--seeds 1-: write numbers and ranges"),
    ("train", ["--seeds", "5-1"], "--seeds 5-1: write ranges upwards"),
    ("train", ["--seeds", "1-3,2"], "--seeds 1-3,2: write ranges upwards, each seed once"),
    ("train", ["--seeds", "1-1001"], "--seeds 1-1001: .*at most 1000 of them"),
    ("train", ["--seeds", "4000001"], "--seeds 4000001: .*none above 4000000"),
    ("train", ["--seeds", "0-99999999999"], "--seeds 0-99999999999: write numbers and ranges"),
    ("train", ["--seeds", "²"], "--seeds ²: write numbers"),
    ("train", ["--seeds", "\u0661-\u0663"], "--seeds \u0661-\u0663: write numbers"),
    ("train", ["--time", "\u0661\u0662"], "--time \u0661\u0662: write minutes"),
    ("train", ["--gpus_per_node", "\u0664"], "--gpus_per_node \u0664: write a number"),
    ("train", ["--nodes", "\u0662"], "--nodes: '\u0662' is not a whole number"),
    ("train", ["--logs", ""], "--logs '': is empty"),
    ("train", ["--venv="], "--venv '': is empty"),
    ("shard", ["--array_tasks", "4000001"], "--array_tasks 4000001: must be from 1 to 4000000"),
    ("train", ["--seeds", "1,2", "--seed", "3"], "--seed 3 and --seeds 1,2: leave --seed out"),
    ("train", ["--time", "5", "--stop_minutes", "5"], "is not before the end of --time 5"),
    ("train", ["--account", "my account"], "--account my account: letters"),
    ("train", ["--sbatch", "--constraint"], "expected one argument"),
    ("train", ["--array_tasks", "3"], "train does not take it .*Write it after `shard`"),
    ("train", ["--nodes", "3"], "256 rows does not divide into 1 micro-batches on each of 3 ranks"),
    ("train", ["--nodes", "2", "--gpus_per_node", "3"], "on each of 6 ranks"),
    ("train", ["--max_stpes", "3"], "unknown setting --max_stpes. Did you mean max_steps"),
    ("train", ["--max_steps", "0"], "--max_steps 0: must be at least 1"),
    ("train", ["--corpus", "new"], "--corpus new: no such folder"),
    ("train", ["--model", "models/there/not"], "--model models/there/not: no such folder"),
    ("train", ["--ds_config", "none.json"], "--ds_config none.json: No such file"),
    ("train", ["--venv", "/usr"], "--venv /usr has no bin/dga-train"),
    ("train", ["--container", "./none.sif"], "--container ./none.sif: no such file"),
    ("train", ["--mounts", "/tmp"], "--mounts .* with --container only"),
    ("train", ["--logs", "100%"], "in the path of a log"),
    ("train", ["--then", "publish"], "--then publish: write one of shard, train, evaluate"),
    ("shard", ["--nodes", "2"], "shard does not take it .its processes are --array_tasks"),
    ("shard", ["--array_task", "0/2"], "--array_task: .*--array_tasks N"),
    ("shard", ["--exclude", "missing.jsonl"], "--exclude missing.jsonl: no such file"),
    ("shard", ["--packing", "tight"], "invalid choice: 'tight'"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "more", "words"), REFUSED, ids=[" ".join(more) for _, more, _ in REFUSED])
def test_refusals(world: SmallWorld, stage: str, more: list[str], words: str):
    arguments = {"train": train, "shard": shard}[stage](world, *more)
    with pytest.raises(UserError, match=words):
        main([*arguments, "--dry_run"])


def test_a_misspelt_stage_has_the_nearest():
    with pytest.raises(UserError, match=r"no stage trian\. Did you mean train\?"):
        parse_chain(["--dry_run", "trian", "--ds_config", "ds_configs/zero2.json"])


def test_text_that_is_not_there_is_refused(world: SmallWorld):
    with pytest.raises(UserError, match=r"shard: INPUT missing\.txt: no such file"):
        parse_chain(["shard", "missing.txt", *shard(world)[2:]])


def test_a_folder_of_another_run_is_refused(world: SmallWorld, tmp_path: Path):
    (tmp_path / "runs" / "mine" / "seed-2").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "seed-2" / "notes.txt").touch()
    with pytest.raises(UserError, match="seed-2 holds other files"):
        parse_chain(train(world, "--seeds", "1-3"))


def test_a_machine_without_slurm(world: SmallWorld, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="no sbatch on this machine"):
        main(train(world))


def test_the_commands_that_are_documented_are_accepted(world: SmallWorld):
    """launchers/slurm/README.md, with a small model in the hub's place and a process for a GPU."""
    text = (REPOSITORY / "launchers" / "slurm" / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^dga-submit (.*)", text, flags=re.MULTILINE)
    for name, source in (("my_text", world.domain_text), ("general_text", world.general_text)):
        Path(name).mkdir()
        (Path(name) / "part.jsonl").symlink_to(source)
    Path("ds_configs").symlink_to(REPOSITORY / "ds_configs")
    Path("suite.yaml").write_text("domain_corpora: [corpora/domain]\ngeneral_corpora: [corpora/general]\n")
    jobs = scripts(shlex.split(command))
    assert [directives(script)["job-name"] for script in jobs] == [
        "dga-shard", "dga-shard", "dga-train", "dga-evaluate"
    ]  # fmt: skip
    for option in re.findall(r"`(--\w+)", text):
        assert option.removeprefix("--") in build_parser().format_help(), option
