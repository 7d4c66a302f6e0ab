"""The model card (README.md) of an exported model: its base, its settings and its held-out figures."""

import json
import re
from pathlib import Path
from typing import Any

import dga_scale
from dga_scale.backbone.extended import MODEL_TYPE
from dga_scale.config.comparison import split_reference
from dga_scale.config.declaration import Refers, as_typed
from dga_scale.config.methods import known_settings
from dga_scale.corpus.shards import VALIDATION
from dga_scale.logging.evaluations import before_and_after, evaluations
from dga_scale.logging.json_lines import LOG_FILE, read_log
from dga_scale.run_folder import RunFolder, read_settings

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(run_dir: Path, step: int, model_config: Path) -> str:
    """Write the card of a run's model after ``step`` steps, from what the run recorded of itself."""
    config = json.loads(model_config.read_text(encoding="utf-8"))
    architecture = config["architectures"][0]
    causal = "CausalLM" in architecture or architecture.endswith("LMHeadModel")
    settings = _settings(run_dir)
    base, corpus = str(settings.get("model", "a pretrained model")), settings.get("corpus", "a domain corpus")
    auto_class = "AutoModelForCausalLM" if causal else "AutoModelForMaskedLM"
    lines = [
        "---",
        *([f"base_model: {base}"] if _HUB_NAME.fullmatch(base) else []),
        "library_name: transformers",
        f"pipeline_tag: {'text-generation' if causal else 'fill-mask'}",
        "tags: [domain-adaptation, continued-pretraining]",
        "---",
        f"# {base} adapted to {corpus}",
        "",
        f"Continued pre-training of {base} on {corpus}: {step} steps with dga_scale {dga_scale.__version__}.",
        *_figures(run_dir, step),
        "",
        "## Use",
        "",
        "```python",
        *(["import dga_scale.backbone.extended"] if config.get("model_type") == MODEL_TYPE else []),
        f"from transformers import {auto_class}, AutoTokenizer",
        "",
        f'model = {auto_class}.from_pretrained("FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        "```",
        "",
        "## Settings of the run",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {as_typed(value)} |" for name, value in settings.items()),
        "",
    ]
    return "\n".join(lines)


def _settings(run_dir: Path) -> dict[str, Any]:
    path = RunFolder(run_dir).config
    settings = read_settings(path) if path.is_file() else {}
    known = known_settings()
    return {
        name: value if name not in known else _shown(value, known[name].refers)
        for name, value in settings.items()
        if value is not None and (name not in known or known[name].affects != "place")
    }


def _shown(value: Any, refers: Refers | None) -> Any:
    """Return a setting's value as the card shows it: without the folders of this machine."""
    if refers is None or value is None:
        return value
    found = []
    for text in value if isinstance(value, list) else [value]:
        before, name, behind = split_reference(text, refers)
        if Path(name).exists() or not _HUB_NAME.fullmatch(name):
            # Every held-out part has the same name; the corpus before it says which it is.
            name = "/".join(Path(name).parts[-2 if Path(name).name == VALIDATION else -1 :])
        found.append(before + name + behind)
    return ", ".join(found)


def _figures(run_dir: Path, step: int) -> list[str]:
    """Tabulate held-out figures of the base model and of the checkpoint's, or the last before it."""
    log = run_dir / LOG_FILE
    records = read_log(log) if log.is_file() else []
    found = before_and_after(records, until=step)
    if not found:
        return []
    evaluated = max(record["step"] for record in evaluations(records) if record["step"] <= step)
    rows = []
    for name, figures in found.items():
        before, after, _ = figures.cells(".4f")
        rows.append(f"| {name.replace('_', ' ')} | {before} | {after} |")
    header = f"| held-out text | step 0 | step {evaluated} |"
    return ["", "## Figures", "", header, "|---|---|---|", *rows]
