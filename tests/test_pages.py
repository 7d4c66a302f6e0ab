"""README and docs: their commands, run as they stand there; only names of data and sizes are made small.

``bash`` blocks are run here, those of the README first, one after the other in one shell; ``python`` blocks
each by themselves. A command in a ``console`` block is run by the test that ``ELSEWHERE`` names.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dga_scale.config.parsing import read_config
from tests.helpers.ranks import REPOSITORY, free_port
from tests.helpers.small import DOMAIN, GENERAL, make_model, make_tokenizer, write_text
from tests.helpers.strict import LOST
from tests.helpers.tiny_tasks import write_task

pytestmark = pytest.mark.slow

PAGES = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8")
    for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
}
README = PAGES["README.md"]
SMALLER = {
    "--num_workers 8": "--num_workers 1",
    "--max_steps 2500": "--max_steps 3",
    "--step 2000": "--step 3",
    "--global_batch_size 256 --": "--global_batch_size 8 --",
    "--seeds 2": "--seeds 1 --epochs 1 --batch_size 8 --learning_rate 1e-3",
}
ELSEWHERE = {
    "make demo": "tests/quickstart/test_prepare.py",
    "make test": "tests/test_pages.py",
    "python tools/forgetting.py": "tests/endtasks/test_seeds.py",
    "python tools/evaluate.py": "tests/endtasks/test_evaluate.py",
    "python tools/extend_vocabulary.py": "tests/vocabulary/test_extend.py",
    "python tools/report.py": "tests/report/test_report.py",
    "python -m benchmarks.experiments.paper_tables": "tests/benchmarks/test_paper_tables.py",
    "dga-submit": "tests/slurm/test_jobs.py",
    "tail": "tests/slurm/test_jobs.py",
}
"""Commands that are not run here: by how they begin, the test that runs what they start."""


def blocks(language: str, pages: dict[str, str] = PAGES) -> list[str]:
    """The fenced blocks of a language, page by page."""
    return [
        block
        for text in pages.values()
        for block in re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    ]


def test_the_walk_on_ones_own_data(tmp_path: Path) -> None:
    """All bash blocks in order, in one shell, with a tiny model in place of RoBERTa-base."""
    for folder, words, documents in (("my_text", DOMAIN, 2500), ("general_text", GENERAL, 600)):
        (tmp_path / folder).mkdir()
        write_text(tmp_path / folder / "part.jsonl", words, documents, seed=documents)
    texts = [tmp_path / "my_text" / "part.jsonl", tmp_path / "general_text" / "part.jsonl"]
    model = make_model(tmp_path / "model", make_tokenizer(texts), positions=164)
    write_task(tmp_path / "endtasks" / "aclarc_citation_intent")
    for name in ("tools", "launchers", "ds_configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    script = "set -euo pipefail\n" + "\n".join(blocks("bash", {"README.md": README}))
    # The domains of a sequence, as a reader would have sharded them.
    script += "\nfor name in restaurant acl; do cp -r corpora/domain corpora/$name; done\n"
    script += "\n".join(blocks("bash", {name: text for name, text in PAGES.items() if name != "README.md"}))
    assert "export MODEL=FacebookAI/roberta-base" in script
    script = script.replace("export MODEL=FacebookAI/roberta-base", f"export MODEL={model}")
    # Documents are few: hold out more of them than half a percent.
    script = script.replace("--num_workers 8", "--num_workers 8 --validation_share 0.1")
    script = script.replace("deepspeed launchers", f"deepspeed --master_port {free_port()} launchers")
    script = script.replace("--global_batch_size 256\n", "--global_batch_size 256 --max_eval_samples 50\n")
    for run in ("runs/mine", "runs/das"):
        script = script.replace(f"--output_dir {run} ", f"--output_dir {run} --importance_samples 32 ")
    for large, small in SMALLER.items():
        assert large in script, f"the pages have no {large}"
        script = script.replace(large, small)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=580
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert LOST not in result.stderr, result.stderr[-3000:]
    assert "dry run: nothing was written" in result.stdout
    run = tmp_path / "runs" / "mine"
    promised = re.search(r"A run folder.*?:\n\n(.*?)\n\n", README, flags=re.DOTALL)
    assert promised
    names = promised.group(1).replace("runs/mine/", "").replace("+ latest", "checkpoints/latest").split()
    assert names
    for name in names:
        expected = name.replace("step-002500", "step-000003")
        assert (run / expected).exists(), expected
    for name in ("my_model/model.safetensors", "merged/model.safetensors", "runs/das/sequence.json"):
        assert (tmp_path / name).exists(), name
    assert (tmp_path / "report.html").read_text(encoding="utf-8").lower().startswith("<!doctype html>")


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.splitlines()[0][:40])
def test_python_examples_run(block: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", block],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert LOST not in result.stderr, result.stderr[-3000:]


def test_commands_that_are_not_run_here_are_run_elsewhere() -> None:
    commands = [line for block in blocks("console") for line in block.splitlines() if line]
    assert commands
    for command in commands:
        tests = [test for start, test in ELSEWHERE.items() if command.startswith(start)]
        assert tests, f"no test runs {command!r}: write it as a bash block, or name its test"
        assert all((REPOSITORY / test).is_file() for test in tests), tests


def test_blocks_say_what_they_are() -> None:
    """A block without a language would be run by nobody."""
    for name, text in PAGES.items():
        fences = re.findall(r"^```(\w*)$", text, flags=re.MULTILINE)
        assert set(fences[::2]) <= {"bash", "console", "python"}, name
        assert set(fences[1::2]) <= {""}, name


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_two_commands_are_targets(target: str) -> None:
    block = re.search(r"## Two commands.*?```console\n(.*?)```", README, flags=re.DOTALL)
    assert block
    assert f"make {target}" in block.group(1).splitlines()
    result = subprocess.run(
        ["make", "-n", target], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr


def test_readme_is_short_and_links_every_page() -> None:
    assert len(README.encode()) <= 9000
    for name in PAGES:
        assert name == "README.md" or f"]({name})" in README, name


def _anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    links = [(name, link) for name, text in PAGES.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert len(links) > 20
    for name, link in links:
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = (REPOSITORY / name).parent / path if path else REPOSITORY / name
            assert target.exists(), f"{name}: {link}"
            assert not anchor or anchor in _anchors(target.read_text(encoding="utf-8")), f"{name}: {link}"


def test_every_path_that_the_pages_name_is_there() -> None:
    named = re.compile(r"`((?:launchers|tools|tests|ds_configs|benchmarks|dga_scale|docs)/[\w./]*)`")
    names = {name for text in PAGES.values() for name in named.findall(text) if "NAME" not in name}
    tour = re.search(r"## A tour of the code\n\n(.*?)\n\n", README, flags=re.DOTALL)
    assert tour
    for line in tour.group(1).splitlines():
        for room in re.findall(r"^ {4}((?:[\w/]+/ )+)", line.replace("/    ", "/ ")):
            own = ("launchers", "tools", "benchmarks", "dga_scale")
            names |= {each if each.startswith(own) else f"dga_scale/{each}" for each in room.split()}
    assert len(names) > 10
    for name in names:
        assert (REPOSITORY / name).exists(), name
    for config in re.findall(r"\| `(zero\w+\.json)`", PAGES["docs/distributed.md"]):
        assert (REPOSITORY / "ds_configs" / config).exists(), config
    for recipe in re.findall(r"\| `(\w+\.yaml)`", PAGES["docs/methods.md"]):
        assert (REPOSITORY / "launchers" / "recipes" / recipe).exists(), recipe


@pytest.mark.parametrize(
    "recipe", sorted((REPOSITORY / "launchers" / "recipes").glob("*.yaml")), ids=lambda path: path.name
)
def test_recipes_hold_valid_settings_and_their_commands_real_flags(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    assert recipe.name in PAGES["docs/methods.md"]
    config = read_config(["--config", str(recipe), "--ds_config", "x.json", "--corpus", "c"])
    for name, value in yaml.safe_load(text).items():
        assert config.as_dict()[name] == value
    comment = " ".join(line.lstrip("# ").rstrip("\\ ") for line in text.splitlines() if line.startswith("#"))
    train = re.search(r"deepspeed launchers/dga_train\.py (.*)", comment)
    assert train
    assert f"--config launchers/recipes/{recipe.name}" in train.group(1)
    read_config(train.group(1).split())


def test_every_command_is_a_program_with_these_flags() -> None:
    """Flags of the commands that are not run here are known to their programs' help."""
    for block in blocks("console"):
        for line in block.splitlines():
            program = re.match(r"python ((?:tools|launchers)/\w+\.py)", line)
            if program:
                done = subprocess.run(
                    [sys.executable, program[1], "--help"],
                    cwd=REPOSITORY,
                    capture_output=True,
                    text=True,
                    timeout=120,
                )
                for flag in re.findall(r" (--\w+)", line):
                    assert flag in done.stdout, f"{line}: {flag}"
