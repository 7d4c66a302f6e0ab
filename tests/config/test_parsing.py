"""The command line as a contract: names, YAML, defaults, and what is refused."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from dga_scale.config.methods import METHOD_SETTINGS, known_settings
from dga_scale.config.parsing import build_parser, read_config
from dga_scale.errors import UserError
from dga_scale.objectives.methods import METHODS

CONTRACT = (
    "--ds_config", "--model", "--corpus", "--output_dir", "--method", "--soft_mask", "--max_steps",
    "--global_batch_size", "--learning_rate", "--contrastive_weight", "--temperature", "--eval_corpus",
    "--general_eval_corpus", "--resume", "--seed", "--config", "--dry_run",
)  # fmt: skip


def parse(text: str):
    return read_config(text.split())


def test_every_promised_flag_is_in_help_with_its_default():
    text = build_parser("dga").format_help()
    for flag in CONTRACT:
        assert flag in text
    for name in known_settings():
        assert f"--{name}" in text
    assert "(default: 0.05)" in text  # the temperature
    assert "which Adam largely undoes" in text


def test_a_methods_settings_stand_under_its_name_only():
    text = build_parser("ewc").format_help()
    general, own, rest = re.split(r"the method's own settings:|\noptimization:", text)
    methods = dict(re.findall(r"--method (\w+)[^:]*: .*\n((?:  .*\n?)*)", rest))
    assert methods.keys() == METHODS.keys()
    assert "--fisher_samples" in own
    for name, method in METHODS.items():
        for setting in fields(method.Settings):
            assert f"--{setting.name} " not in general
            assert (f"--{setting.name} " in methods[name]) == (name != "ewc")
            assert (f"--{setting.name} " in own) == (
                setting.name in METHOD_SETTINGS["ewc"].__dataclass_fields__
            )


def test_defaults_are_the_papers():
    config = parse("--ds_config x.json")
    assert config.method_name == "dga"
    assert config.method.soft_mask == "gradient"
    assert config.method.temperature == 0.05
    assert config.method.contrastive_weight == 1.0
    assert config.optimization.global_batch_size * config.optimization.max_steps == 640_000
    assert config.explicit == {"ds_config"}


def test_flags_win_over_yaml(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 5.0e-5\nmax_steps: 7\nbf16: false\nds_config: a.json\n")
    config = parse(f"--config {file} --max_steps 9")
    assert config.optimization.learning_rate == 5e-5
    assert config.optimization.max_steps == 9
    assert config.optimization.bf16 is False
    assert config.explicit == {"learning_rate", "max_steps", "bf16", "ds_config"}


def test_yaml_can_set_every_setting_and_reads_back(tmp_path: Path):
    config = parse("--ds_config x.json --model m --corpus c --output_dir o --dropout 0.1")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.as_dict()))
    assert parse(f"--config {file}").as_dict() == config.as_dict()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--ds_config x --max_stpes 3", "Did you mean max_steps"),
        ("--ds_config x --learning-rat 3", "Did you mean learning_rate"),
        ("--ds_config x --max_steps abc", "abc"),
        ("--ds_config x --method dgaa", "dgaa"),
        ("--ds_config x stray", "stray"),
        ("--config /does/not/exist.yaml", "/does/not/exist.yaml"),
        ("--ds_config x --max_steps -3", "max_steps -3"),
        ("--ds_config x --temperature 0", "temperature 0"),
        ("--ds_config x --temperature nan", "temperature nan"),
        ("--ds_config x --mlm_probability 1.5", "mlm_probability 1.5"),
        ("--ds_config x --random_replace_prob 0.5", "random_replace_prob 0.5"),
        ("--max_steps 3", "--ds_config is needed"),
        ("--ds_config x --model m", "--corpus is missing"),
        ("--ds_config x --corpus m", "--model is missing"),
    ],
)
def test_a_wrong_setting_is_named(arguments: str, named: str):
    with pytest.raises(UserError, match=named.replace(".", r"\.")):
        parse(arguments)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("learning_rte: 3", "Did you mean learning_rate"),
        ("- a\n- b", "holds no settings"),
        ("learning_rate: [1, 2]", "learning_rate must be one value"),
        ("a: b: c", "is not YAML"),
    ],
)
def test_a_wrong_yaml_file_is_named(tmp_path: Path, content: str, named: str):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=named):
        parse(f"--config {file} --ds_config x")


def test_a_mistake_ends_with_one_line_and_code_2():
    command = [sys.executable, "launchers/dga_train.py", "--ds_config", "x", "--max_stpes", "3"]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: unknown setting --max_stpes")
    assert "Traceback" not in result.stderr
