"""Score merged models without writing them: each coefficient's gain in the domain and cost outside."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dga_scale.backbone.loading import load_model
from dga_scale.corpus.shards import Corpus, check_sequence_length
from dga_scale.evaluation.held_out import Evaluator, open_held_out
from dga_scale.logging.plots import save_png, trade_off_figure
from dga_scale.merging.merge import Merge
from dga_scale.merging.settings import MergeSettings
from dga_scale.objectives.methods.mlm import MaskedLM
from dga_scale.objectives.training_model import TrainingModel
from dga_scale.run_folder import write_text


def sweep(
    merge: Merge,
    coefficients: Sequence[MergeSettings],
    corpora: Mapping[str, Corpus],
    *,
    batch_size: int = 16,
    max_rows: int | None = 2000,
) -> Iterator[dict[str, Any]]:
    """Merge in memory and score, one coefficient after another.

    Yields:
        The weight, and the loss and accuracy on each corpus by its name.
    """
    loaded = load_model(merge.models[0].name)
    for corpus in corpora.values():
        check_sequence_length(corpus, loaded.anatomy.max_positions)
    model = TrainingModel(loaded.model, loaded.anatomy, MaskedLM(MaskedLM.Settings()))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    evaluator = Evaluator.of_one_process(model, corpora, batch_size=batch_size, max_rows=max_rows)
    for settings in coefficients:
        merge.load_into(loaded.model, settings)
        yield {"weight": settings.weight, **evaluator.evaluate(model)}


def report_sweep(merge: Merge, coefficients: Sequence[MergeSettings], options: argparse.Namespace) -> None:
    """Sweep with the options of ``dga-merge``: print a table, write ``sweep.json`` and ``sweep.png``."""
    corpora = {
        "domain": open_held_out(options.corpus, merge.base.tokenizer),
        "general": open_held_out(options.general_corpus, merge.base.tokenizer),
    }
    points = []
    for point in sweep(
        merge, coefficients, corpora, batch_size=options.batch_size, max_rows=options.max_eval_samples
    ):
        points.append(point)
        print(f"weight {point['weight']:g}: domain loss {point['domain_loss']:.4f}, "
              f"general loss {point['general_loss']:.4f}", flush=True)  # fmt: skip
    options.results.mkdir(parents=True, exist_ok=True)
    content = {
        "base": options.base,
        "models": options.model,
        "method": options.method,
        "density": options.density if options.method == "ties" else None,
        "corpora": {
            name: {"path": str(c.path), "content_hash": c.content_hash} for name, c in corpora.items()
        },
        "max_eval_samples": options.max_eval_samples,
        "points": points,
    }
    write_text(options.results / "sweep.json", json.dumps(content, indent=2) + "\n")
    path = [(f"{p['weight']:g}", p["domain_loss"], p["general_loss"]) for p in points]
    save_png(trade_off_figure({options.method: path}), options.results / "sweep.png")
    table = Table(title=f"{options.method}: 0 is {options.base}, 1 is {', '.join(options.model)}")
    for column in ("weight", "domain loss", "domain accuracy", "general loss", "general accuracy"):
        table.add_column(column, justify="right")
    for point in points:
        names = ("domain_loss", "domain_accuracy", "general_loss", "general_accuracy")
        table.add_row(f"{point['weight']:g}", *(f"{point[name]:.4f}" for name in names))
    Console().print(table)
    print(f"results: {options.results / 'sweep.json'}, {options.results / 'sweep.png'}")
