"""Compare models with the base that they were adapted from: held-out loss and end tasks, with intervals.

A difference is averaged and tested over:

- one folder, loss: batches of held-out text, on which all models see the same masks;
- one folder, end task: fine-tuning seeds, seed by seed with the base's;
- several folders of one label (trained with several seeds): the folders, each with the mean of its
  fine-tuning seeds, against the base's mean.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dga_scale.backbone.loading import load_model, load_model_config
from dga_scale.corpus.reading.overlap import Overlap, found_in_text
from dga_scale.corpus.reading.sources import ReadOptions
from dga_scale.corpus.shards import Corpus, check_sequence_length, file_sha256
from dga_scale.corpus.tokenizer import load_tokenizer, tokenizer_hash
from dga_scale.endtasks.recipes import Recipe
from dga_scale.endtasks.seeds import FineTuning, model_fingerprint, run_missing, summarize
from dga_scale.endtasks.significance import (
    Difference,
    Interval,
    difference,
    interval,
    ratio,
    ratio_difference,
)
from dga_scale.endtasks.suite import BASE, Suite
from dga_scale.endtasks.tasks import Task, majority_share
from dga_scale.errors import UserError
from dga_scale.evaluation.held_out import Evaluator, open_held_out
from dga_scale.logging.evaluations import perplexity
from dga_scale.objectives.methods.mlm import MaskedLM
from dga_scale.objectives.training_model import TrainingModel
from dga_scale.report.scores import FORMAT, RESULTS
from dga_scale.run_folder import write_text
from dga_scale.storage.checked_json import load_object
from dga_scale.storage.typed_json import build

_LABEL = re.compile(r"[\w.+-]+")

Sums = dict[str, list[float]]
"""The sums of each batch of a corpus: "loss" (summed over the labels), "labels" and "correct"."""


@dataclass(frozen=True)
class EvaluatedModel:
    """A model under one label, or several models that differ by their training seed."""

    label: str
    folders: tuple[str, ...]

    def output(self, root: Path, number: int) -> Path:
        """Return the folder for the results of the model in ``folders[number]``."""
        return root / self.label / ("" if number == 0 else str(number + 1))


def parse_models(texts: Sequence[str]) -> list[EvaluatedModel]:
    """Parse ``DIR`` or ``LABEL=DIR``; DIR alone is labelled by its name, a run's model/ by the run's name.

    Raises:
        UserError: A label can't be a file's name, is "base", or results for two folders without being given.
    """
    folders: dict[str, list[str]] = {}
    label_given: dict[str, bool] = {}
    for text in texts:
        label, equals, folder = text.partition("=")
        named = bool(equals) and not Path(text).is_dir()
        if not named:
            path = Path(text).resolve()
            label, folder = path.parent.name if path.name == "model" else path.name, text
        if not _LABEL.fullmatch(label) or not folder or label == BASE:
            raise UserError(
                f"--model {text}: {label!r} can't be its label. Write LABEL=DIR, LABEL of letters, digits, "
                f"- and _, other than {BASE!r}."
            )
        if label in folders and not (named and label_given[label]):
            raise UserError(
                f"--model {text}: another model is labelled {label} too. Write LABEL=DIR: one label for "
                "models that differ by their seed only, several for others."
            )
        folders.setdefault(label, []).append(folder)
        label_given[label] = named
    return [EvaluatedModel(label, tuple(paths)) for label, paths in folders.items()]


def evaluate(base: str, models: Sequence[EvaluatedModel], suite: Suite, output: Path) -> dict[str, Any]:
    """Score the base and all models on a suite; results that ``output`` holds are not computed again.

    Returns:
        The content of ``output/results.json``: ``models`` by label, the base first, with ``corpora``,
        ``tasks``, ``domain_loss`` and ``general_loss``; ``overlap`` of the tasks; ``notes`` on them.

    Raises:
        UserError: A model, corpus or task can't be read; a corpus has another tokenizer than the base; or
            there is nothing to compare a model by.
    """
    evaluated = [EvaluatedModel(BASE, (base,)), *models]
    tasks = suite.load_tasks()
    notes: list[str] = []
    comparable = {e.label: _comparable(base, e, bool(tasks), suite, notes) for e in evaluated}
    tokenizer = load_tokenizer(base)
    corpora = {name: open_held_out(folder, tokenizer) for _, name, folder in suite.corpora()}
    overlap = _overlap(suite, [task for _, task, _ in tasks], corpora)
    output.mkdir(parents=True, exist_ok=True)
    sums: dict[str, list[dict[str, Sums]]] = {}
    scores: dict[str, list[dict[str, dict[str, Any]]]] = {}
    for each in evaluated:
        sums[each.label] = []
        for number, folder in enumerate(each.folders):
            model_output = each.output(output, number)
            model_output.mkdir(parents=True, exist_ok=True)
            if comparable[each.label] and corpora:
                sums[each.label].append(_held_out_sums(folder, corpora, suite, model_output))
    seeds = range(1, suite.seeds + 1)
    fine_tunings = {
        (each.label, number, task.name): FineTuning(
            folder, task, recipe, each.output(output, number) / task.name
        )
        for each in evaluated
        for number, folder in enumerate(each.folders)
        for _, task, recipe in tasks
    }
    # All tasks are run in one call, so that no process waits for a task's last seed.
    run_missing(list(fine_tunings.values()), seeds, jobs=suite.jobs)
    for each in evaluated:
        scores[each.label] = [
            {task.name: summarize(fine_tunings[each.label, number, task.name], seeds) for _, task, _ in tasks}
            for number in range(len(each.folders))
        ]
    results = {}
    for each in evaluated:
        label = each.label
        results[label] = {
            "folders": list(each.folders),
            "corpora": {
                name: {"kind": kind, **_loss(name, sums[label], sums[BASE][0])}
                for kind, name, _ in suite.corpora()
                if sums[label]
            },
            "tasks": {
                task.name: {"kind": kind, **_score(task, recipe, scores[label], scores[BASE][0])}
                for kind, task, recipe in tasks
            },
        }
        for kind in ("domain", "general"):
            names = [name for k, name, _ in suite.corpora() if k == kind]
            if names and sums[label]:
                values = [sum(_mean(found[name]) for name in names) / len(names) for found in sums[label]]
                results[label][f"{kind}_loss"] = {**vars(interval(values)), "values": values}
    notes += _notes_on_seeds(evaluated, suite, tasks)
    result = {
        "format": FORMAT,
        "base": base,
        "suite": dataclasses.asdict(suite),
        "models": results,
        "overlap": overlap,
        "notes": notes,
    }
    write_text(output / RESULTS, json.dumps(result, indent=2) + "\n")
    return result


def _comparable(base: str, model: EvaluatedModel, tasks: bool, suite: Suite, notes: list[str]) -> bool:
    """Return whether a model's losses per token can be compared with the base's, and note where not.

    Raises:
        UserError: They can't, and there is nothing else to compare.
    """
    tasks_only = next(suite.corpora(), None) is None
    ours, *theirs = (load_model_config(name, any_architecture=tasks_only) for name in (base, *model.folders))
    reason = ""
    if any(tokenizer_hash(load_tokenizer(f)) != tokenizer_hash(load_tokenizer(base)) for f in model.folders):
        reason = "has another tokenizer than the base: its tokens stand for other text"
    elif any(each.causal != ours.causal for each in theirs):
        kinds = ("causal", "masked") if not ours.causal else ("masked", "causal")
        reason = f"is a {kinds[0]} LM and the base a {kinds[1]} one: they predict other tokens"
    if reason and not tasks_only:
        message = f"{model.label} {reason}, so losses and perplexities can't be compared"
        if not tasks:
            advice = "Give the base that it was adapted from, or end tasks in the suite."
            raise UserError(f"{message}. {advice}", model.folders[0])
        notes.append(f"{message}; end tasks are.")
    types = {each.config.model_type for each in theirs} - {ours.config.model_type}
    if types:
        notes.append(
            f"{model.label} is of another architecture ({', '.join(sorted(types))}) than the base "
            f"({ours.config.model_type}): differences are not due to the adaptation alone."
        )
    return not reason


def _held_out_sums(folder: str, corpora: Mapping[str, Corpus], suite: Suite, output: Path) -> dict[str, Sums]:
    """Return each corpus's sums by batch, from ``output/held_out.json`` if that has the same inputs."""
    file = output / "held_out.json"
    identity = {
        "model": model_fingerprint(folder),
        "corpora": {name: corpus.content_hash for name, corpus in corpora.items()},
        "max_eval_rows": suite.max_eval_rows,
        "batch_size": suite.batch_size,
    }
    if file.exists():
        try:
            content = load_object(file)
            if content.get("identity") == identity:
                sums: dict[str, Sums] = build(dict[str, Sums], content.get("sums"), "sums")
                if sums.keys() == corpora.keys() and all(map(_is_whole, sums.values())):
                    return sums
        except (OSError, ValueError):
            print(f"{file} is damaged: its losses are computed again.")
    loaded = load_model(folder)
    for corpus in corpora.values():
        check_sequence_length(corpus, loaded.anatomy.max_positions)
    model = TrainingModel(loaded.model, loaded.anatomy, MaskedLM(MaskedLM.Settings()))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    evaluator = Evaluator.of_one_process(
        model, corpora, batch_size=suite.batch_size, max_rows=suite.max_eval_rows
    )
    found = {}
    for name in corpora:
        columns = evaluator.batch_sums(model, name).T.tolist()
        found[name] = dict(zip(("loss", "labels", "correct"), columns, strict=True))
        print(f"{folder} on {name}: loss {_mean(found[name]):.4f}", flush=True)
    write_text(file, json.dumps({"identity": identity, "sums": found}) + "\n")
    return found


def _is_whole(sums: Sums) -> bool:
    counts = {len(sums.get(name, ())) for name in ("loss", "labels", "correct")}
    return len(counts) == 1 and 0 not in counts and all(count > 0 for count in sums["labels"])


def _mean(sums: Sums) -> float:
    return math.fsum(sums["loss"]) / math.fsum(sums["labels"])


def _loss(name: str, models: Sequence[Mapping[str, Sums]], base: Mapping[str, Sums]) -> dict[str, Any]:
    """Return the loss of the models of a label on a corpus, and its difference to the base's."""
    values = [_mean(each[name]) for each in models]
    compared: Difference | None = None
    if len(models) == 1:
        own, ref = models[0][name], base[name]
        estimate: Interval = ratio(own["loss"], own["labels"])
        if models[0] is not base:
            compared = ratio_difference(own["loss"], ref["loss"], ref["labels"])
    else:
        estimate, compared = interval(values), difference(values, [_mean(base[name])] * len(values))
    accuracies = [math.fsum(each[name]["correct"]) / math.fsum(each[name]["labels"]) for each in models]
    return {
        "loss": vars(estimate),
        "perplexity": perplexity(estimate.mean),
        "accuracy": math.fsum(accuracies) / len(accuracies),
        "values": values,
        "over": "batches of text" if len(models) == 1 else "models",
        "difference": None if compared is None else vars(compared),
    }


def _score(
    task: Task,
    recipe: Recipe,
    models: Sequence[Mapping[str, dict[str, Any]]],
    base: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """Return the score of the models of a label on a task, and its difference to the base's."""
    by_seed = [list(each[task.name]["scores"][recipe.metric]["by_seed"].values()) for each in models]
    reference = list(base[task.name]["scores"][recipe.metric]["by_seed"].values())
    if len(models) == 1:
        values = by_seed[0]
    else:
        values = [math.fsum(seeds) / len(seeds) for seeds in by_seed]
        reference = [math.fsum(reference) / len(reference)] * len(values)
    return {
        "metric": recipe.metric,
        "score": vars(interval(values)),
        "values": values,
        "over": "seeds" if len(models) == 1 else "models",
        "scored_on": task.scored_on,
        "majority_share": None if task.regression else majority_share(task.test),
        "difference": None if models[0] is base else vars(difference(values, reference)),
    }


def _notes_on_seeds(
    evaluated: Sequence[EvaluatedModel], suite: Suite, tasks: Sequence[tuple[str, Task, Recipe]]
) -> list[str]:
    notes = []
    if tasks and suite.seeds == 1:
        notes.append("One fine-tuning seed: scores have no interval and differences no test.")
    elif tasks and 2 / 2**suite.seeds > 0.05:
        notes.append(f"With {suite.seeds} seeds the sign-flip test can't fall below {2 / 2**suite.seeds:g}.")
    if next(suite.corpora(), None) and any(len(model.folders) == 1 for model in evaluated[1:]):
        notes.append(
            "Losses of a label with one folder are tested over held-out text: another training seed might "
            "give another model. Train several, and give them one label."
        )
    comparisons = (len(evaluated) - 1) * (len(tasks) + len(list(suite.corpora())))
    if comparisons > 1:
        notes.append(
            f"{comparisons} comparisons: of so many, {comparisons / 20:.1f} fall below p = 0.05 by chance."
        )
    from_dev = [task.name for _, task, _ in tasks if task.scored_on == "dev"]
    if from_dev:
        notes.append(f"Scored on dev.jsonl, there being no test.jsonl: {', '.join(from_dev)}.")
    for _, task, _ in tasks:
        if task.left_out:
            total = len(task.test) + task.left_out
            notes.append(f"{task.name} is scored on {len(task.test):,} of its {total:,} examples.")
    return notes


def _overlap(suite: Suite, tasks: Sequence[Task], corpora: Mapping[str, Corpus]) -> dict[str, dict[str, Any]]:
    """Count how many of each task's scored examples occur in the unlabelled text; None without such text."""
    files = [str(task.path / f"{task.scored_on}.jsonl") for task in tasks]
    found: Sequence[int | None] = [None] * len(files)
    if suite.unlabelled_text and files:
        overlap = Overlap(files)
        found = found_in_text(
            overlap, suite.unlabelled_text, ReadOptions(suite.text_field, whole_files=False)
        )
    return {
        task.name: {
            "file": file,
            "examples": len(task.test) + task.left_out,
            "found": count,
            "excluded_from": [
                name
                for name, corpus in corpora.items()
                if file_sha256(Path(file)) in {each.sha256 for each in corpus.manifest.excluded}
            ],
        }
        for task, file, count in zip(tasks, files, found, strict=True)
    }
