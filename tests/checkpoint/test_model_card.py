"""The card of a model: what it was made from and what it measured."""

import json
from pathlib import Path
from typing import Any

import yaml

from dga_scale.checkpoint.model_card import model_card
from tests.helpers.evaluations import evaluation


def run_of(folder: Path, model: str, records: list[dict[str, Any]]) -> Path:
    settings = {
        "model": model,
        "corpus": str(folder / "somewhere" / "acl"),
        "eval_corpus": str(folder / "somewhere" / "acl" / "validation"),
        "method": "dga",
        "protect": ["heads", "ffn_output"],
        "dropout": None,
        "bf16": True,
        "learning_rate": 1e-4,
        "output_dir": str(folder),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.json").write_text(json.dumps({"architectures": ["RobertaForMaskedLM"]}))
    return folder


def test_figures_of_the_step_it_holds(tmp_path: Path) -> None:
    records = [
        evaluation(0, domain=4.2, general=3.8),
        {"step": 50, "loss/total": 4.0},
        evaluation(100, domain=3.7, general=3.9),
        evaluation(200, domain=3.5, general=4.0),
    ]
    card = model_card(run_of(tmp_path, "FacebookAI/roberta-base", records), 100, tmp_path / "config.json")
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "FacebookAI/roberta-base"
    assert front["pipeline_tag"] == "fill-mask"
    assert "# FacebookAI/roberta-base adapted to acl" in card
    assert "| held-out text | step 0 | step 100 |" in card
    assert "| domain loss | 4.2000 | 3.7000 |" in card
    assert "| general loss | 3.8000 | 3.9000 |" in card
    shown = dict(line.strip("| ").split(" | ") for line in card.split("|---|---|\n")[-1].splitlines())
    assert shown == {
        "model": "FacebookAI/roberta-base",
        "corpus": "acl",
        "eval_corpus": "acl/validation",
        "method": "dga",
        "protect": "heads ffn_output",
        "bf16": "true",
        "learning_rate": "0.0001",
    }
    assert "AutoModelForMaskedLM" in card


def test_a_base_that_was_not_measured_on_the_text(tmp_path: Path) -> None:
    records = [evaluation(0, rows=10, domain=4.2, general=3.8), evaluation(100, rows=20, domain=3.7)]
    card = model_card(run_of(tmp_path, "base", records), 100, tmp_path / "config.json")
    assert "| domain loss | not measured | 3.7000 |" in card
    assert "general" not in card.split("## Figures")[1].split("## Use")[0]


def test_a_checkpoint_before_the_first_evaluation_has_no_figures(tmp_path: Path) -> None:
    card = model_card(run_of(tmp_path, "base", [evaluation(0, domain=4.2)]), 5, tmp_path / "config.json")
    assert "## Figures" not in card


def test_paths_of_the_machine_are_not_told(tmp_path: Path) -> None:
    card = model_card(run_of(tmp_path, str(tmp_path / "my-bert"), []), 5, tmp_path / "config.json")
    assert str(tmp_path) not in card
    assert "# my-bert adapted to acl" in card
    assert "base_model" not in card
    assert "## Figures" not in card


def test_a_checkpoint_without_its_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    card = model_card(tmp_path / "gone", 5, tmp_path / "config.json")
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "text-generation"
    assert "AutoModelForCausalLM" in card


def test_a_class_of_ours_is_imported(tmp_path: Path) -> None:
    config = {"architectures": ["ExtendedForCausalLM"], "model_type": "dga_extended"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    card = model_card(tmp_path / "gone", 5, tmp_path / "config.json")
    assert "import dga_scale.backbone.extended\nfrom transformers import AutoModelForCausalLM" in card
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["RobertaForMaskedLM"]}))
    assert "dga_scale.backbone" not in model_card(tmp_path / "gone", 5, tmp_path / "config.json")
