"""The README's commands, run as they stand there; only names of data and sizes are made small."""

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

pytestmark = pytest.mark.slow

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
SMALLER = {
    "--num_workers 8": "--num_workers 1",
    "--max_steps 2500": "--max_steps 3",
    "--step 2500": "--step 3",
    "--global_batch_size 256": "--global_batch_size 8",
}


def shell_blocks() -> list[str]:
    return re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)


def test_the_walk_on_ones_own_data(tmp_path: Path):
    """All bash blocks in order, in one shell, with a tiny model in place of RoBERTa-base."""
    for folder, words, documents in (("my_text", DOMAIN, 2500), ("general_text", GENERAL, 600)):
        (tmp_path / folder).mkdir()
        write_text(tmp_path / folder / "part.jsonl", words, documents, seed=documents)
    texts = [tmp_path / "my_text" / "part.jsonl", tmp_path / "general_text" / "part.jsonl"]
    model = make_model(tmp_path / "model", make_tokenizer(texts), positions=164)
    for name in ("tools", "launchers", "ds_configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    script = "set -euo pipefail\n" + "\n".join(shell_blocks())
    assert "export MODEL=FacebookAI/roberta-base" in script
    script = script.replace("export MODEL=FacebookAI/roberta-base", f"export MODEL={model}")
    # Documents are few: hold out more of them than half a percent.
    script = script.replace("--num_workers 8", "--num_workers 8 --validation_share 0.1")
    script = script.replace("deepspeed launchers", f"deepspeed --master_port {free_port()} launchers")
    for large, small in SMALLER.items():
        assert large in script, f"the README has no {large}"
        script = script.replace(large, small)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "2"}
    result = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=540
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "dry run: nothing was written" in result.stdout
    run = tmp_path / "runs" / "mine"
    promised = re.search(r"A run folder:\n\n(.*?)\n\n", README, flags=re.DOTALL)
    assert promised
    names = promised.group(1).replace("runs/mine/", "").replace("+ latest", "checkpoints/latest").split()
    assert names
    for name in names:
        expected = name.replace("step-002500", "step-000003")
        assert (run / expected).exists(), expected
    assert (tmp_path / "my_model" / "model.safetensors").exists()
    assert (tmp_path / "report.html").read_text(encoding="utf-8").lower().startswith("<!doctype html>")


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_quickstart_commands_are_targets(target: str):
    block = re.search(r"## Quickstart.*?```\n(.*?)```", README, flags=re.DOTALL)
    assert block
    assert f"make {target}" in block.group(1).splitlines()
    result = subprocess.run(
        ["make", "-n", target], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr


def test_every_path_that_the_readme_names_is_there():
    names = set(re.findall(r"`((?:launchers|tools|tests|ds_configs|benchmarks)/[\w./]*)`", README))
    tour = re.search(r"## A tour of the code\n\n(.*?)\n\n", README, flags=re.DOTALL)
    assert tour
    names |= set(re.findall(r"(?:^| )((?:dga_scale|launchers|tools|benchmarks)/[\w.]*)", tour.group(1)))
    assert len(names) > 10
    for name in names:
        assert (REPOSITORY / name).exists(), name
    for config in re.findall(r"\| `(zero\w+\.json)`", README):
        assert (REPOSITORY / "ds_configs" / config).exists(), config
    for recipe in re.findall(r"\| `(\w+\.yaml)`", README):
        assert (REPOSITORY / "launchers" / "recipes" / recipe).exists(), recipe


@pytest.mark.parametrize(
    "recipe", sorted((REPOSITORY / "launchers" / "recipes").glob("*.yaml")), ids=lambda path: path.name
)
def test_recipes_hold_valid_settings_and_their_commands_real_flags(recipe: Path):
    text = recipe.read_text(encoding="utf-8")
    assert recipe.name in README
    config = read_config(["--config", str(recipe), "--ds_config", "x.json", "--corpus", "c"])
    for name, value in yaml.safe_load(text).items():
        assert config.as_dict()[name] == value
    comment = " ".join(line.lstrip("# ").rstrip("\\ ") for line in text.splitlines() if line.startswith("#"))
    train = re.search(r"deepspeed launchers/dga_train\.py (.*)", comment)
    assert train
    assert f"--config launchers/recipes/{recipe.name}" in train.group(1)
    read_config(train.group(1).split())
