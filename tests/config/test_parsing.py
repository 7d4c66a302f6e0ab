"""The command line as a contract: names, YAML, defaults, and what is refused."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from dga_scale.config.hints import HINTS
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
    assert "which Adam largely undoes" in " ".join(text.split())


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


def test_defaults_are_the_papers_but_for_where_the_mask_is():
    config = parse("--ds_config x.json")
    assert config.method_name == "dga"
    assert config.method.soft_mask == "update"  # where the papers' formula does nothing
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
        ("--ds_config x --bf16 perhaps", "perhaps"),
        ("--ds_config x --soft_mask updates", "updates"),
        ("--ds_config x --num_train_epochs 3", "Here a run's length is --max_steps"),
        ("--ds_config x --warmup_steps 3", "Here write --warmup_ratio"),
        ("--ds_config x --model_name_or_path m", "Here write --model. See"),
        ("--ds_config x --report_to wandb", "TensorBoard"),
        ("--ds_config x stray", "stray"),
        ("--config /does/not/exist.yaml", "/does/not/exist.yaml"),
        ("--ds_config x --max_steps -3", "max_steps -3"),
        ("--ds_config x --protect heads heads", "--protect heads heads: heads is named twice"),
        ("--ds_config x --method lora --lora_targets up query up", "up is named twice"),
        ("--ds_config x --temperature 0", "temperature 0"),
        ("--ds_config x --temperature nan", "temperature nan"),
        ("--ds_config x --mlm_probability 1.5", "mlm_probability 1.5"),
        ("--ds_config x --random_replace_prob 0.5", "random_replace_prob 0.5"),
        ("--max_steps 3", "--ds_config is needed"),
        ("--ds_config x --max_steps 3 --max_steps 4", "--max_steps is given twice. Give it once"),
        ("--ds_config x --max-steps 3 --max_steps=4", "--max_steps is given twice"),
        ("--ds_config x --learning_rate inf", "learning_rate inf: must be a finite number"),
        ("--ds_config x --learning_rate 1e999", "learning_rate inf: must be a finite number"),
        ("--ds_config x --seed -1", "seed -1: must be from 0 to 4294967295"),
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
        ("a: b: c", "run.yaml: not YAML"),
        ("max_steps: 3\nseed: 1\nmax_steps: 4", "run.yaml:3: 'max_steps' stands twice in one mapping"),
        ("max_steps: 3\nlearning_rte: 3", "run.yaml:2: unknown setting 'learning_rte'. Did you mean"),
        ("seed: 1\nlearning_rate: abc", "run.yaml:2: learning_rate is 'abc', and must be a number"),
        ("save_steps: 1.5", "run.yaml:1: save_steps is '1.5', and must be a whole number"),
        ("method: mlm\nmax_steps: -3", "run.yaml:2: max_steps is '-3', and must be at least 1"),
        ("bf16: perhaps", "run.yaml:1: bf16 is 'perhaps', and must be true or false"),
        ("soft_mask: hard", "run.yaml:1: soft_mask is 'hard', and must be one of"),
        ("corpus: &a [*a]", "must be one value|is a list"),
        ("max_steps: " + "9" * 5000, "run.yaml: not YAML: Exceeds the limit"),
        ("a: " + "[" * 10**4, "run.yaml: not YAML"),
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


@pytest.mark.parametrize("words", ["--local_rank=1", "--local_rank 1", "--local-rank=1"])
def test_the_rank_that_a_launcher_passes_is_no_setting(words: str):
    config = parse(f"{words} --ds_config x.json --max_steps 3")
    assert config.as_dict() == parse("--ds_config x.json --max_steps 3").as_dict()
    assert "local_rank" not in config.as_dict()
    assert "local_rank" not in build_parser("dga").format_help()


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("--bf16", True),
        ("--bf16 true", True),
        ("--bf16=yes", True),
        ("--bf16 0", False),
        ("--bf16=False", False),
    ],
)
def test_a_switch_takes_a_word_or_none(words: str, value: bool):
    assert parse(f"--ds_config x {words}").optimization.bf16 is value


def test_dashes_and_lists():
    config = parse(
        "--ds-config x.json --mix a:0.1 b:0.2 --max-steps=7 --prior-importance one two --method das"
    )
    assert config.run.ds_config == "x.json"
    assert config.data.mix == ["a:0.1", "b:0.2"]
    assert config.optimization.max_steps == 7
    assert config.method.prior_importance == ["one", "two"]
    assert config.explicit == {"ds_config", "mix", "max_steps", "prior_importance", "method"}


def test_hints_lead_to_settings_that_there_are():
    for name, hint in HINTS.items():
        assert name not in known_settings()
        for flag in re.findall(r"--(\w+)", hint):
            assert flag in {*known_settings(), "sequence_length"}, name
