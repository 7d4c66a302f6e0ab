"""Domain after domain: a chain of runs, each from the model that the last one left (DAS, arXiv 2302.03241).

The folder of a sequence holds a whole run for each domain, ``1-restaurant/``, ``2-acl/``, ...: its own
optimizer, schedule, checkpoints, model and importances. What is complete is not done again, and a run that
was stopped resumes where it was.
"""

import dataclasses
import gc
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dga_scale.backbone.loading import load_model_config
from dga_scale.config.methods.mlm import MLMSettings
from dga_scale.config.methods.shared import PriorImportanceSettings
from dga_scale.config.settings import TrainConfig
from dga_scale.corpus.shards import open_corpus
from dga_scale.corpus.tokenizer import load_tokenizer
from dga_scale.errors import UserError
from dga_scale.launch.preemption import StopRequest
from dga_scale.launch.world import Cluster
from dga_scale.report.report import write_report
from dga_scale.run_folder import RunFolder, write_text
from dga_scale.train.finish import finished_steps, read_summary
from dga_scale.train.inputs import (
    default_output_dir,
    held_out_part,
    makes_several_runs,
)
from dga_scale.train.loop import train
from dga_scale.train.same_run import own_folder
from dga_scale.train.schedule import may_extend


def train_sequence(config: TrainConfig, cluster: Cluster) -> int:
    """Train on each ``--corpus`` in turn, from a dense model's warm-up where the method has one.

    Returns:
        The exit code of the last run: 0, or that of a run that was stopped.

    Raises:
        UserError: On every rank; also for a corpus that only a later domain needs, before any is trained.
    """
    stages = cluster.run_on_all(lambda: _stages(config))
    if len(stages) == 1:
        return train(config, cluster)
    root = Path(stages[0].run.output_dir or "").parent
    several = len(config.data.corpus or []) > 1
    # What is asked for in a run's last steps ends the next before it begins.
    with StopRequest(), ExitStack() as held:
        if not config.run.dry_run:
            held.enter_context(own_folder(root, cluster))
        if several:
            cluster.run_on_first(lambda: _check_same_sequence(root, stages))
        if config.run.dry_run:  # from what is there: earlier domains would leave the model and importances
            start: dict[str, Any] = {"model": config.model.model, "random_init": config.model.random_init}
            if isinstance(config.method, PriorImportanceSettings):
                start["prior_importance"] = config.method.prior_importance
            return train(stages[-1].replace(**start), cluster)
        for settings in stages:
            if cluster.run_on_first(partial(_complete, settings, stages)):
                continue
            code = train(settings, cluster)
            if code != 0:
                return code
            gc.collect()  # the engine holds itself in cycles: its memory is needed by the next
            if cluster.device.type == "cuda":
                torch.cuda.empty_cache()
        if several:
            cluster.run_on_first(lambda: _finish(config, stages))
    return 0


def _stages(config: TrainConfig) -> list[TrainConfig]:
    """Return the settings of the runs that a command asks for."""
    if not makes_several_runs(config):
        return [config]
    root = Path(config.run.output_dir or default_output_dir(config))
    warmup = config.method.dense_warmup_steps
    if len(config.data.corpus or []) > 1:
        if warmup:
            raise UserError(
                f"--{config.method.dense_warmup_setting} {warmup} trains a dense model on one corpus, this "
                "run has several: train it on the first with --method mlm, and give that run's model/ as "
                "--model"
            )
        names = _checked(config)
        folders = [root / f"{number}-{name}" for number, name in enumerate(names, 1)]
        return [_domain(config, folders, number) for number in range(len(names))]
    dense = dataclasses.replace(config, method=MLMSettings()).replace(
        output_dir=str(root / "1-dense"), max_steps=warmup, lr_scheduler_type="constant"
    )
    own = dataclasses.replace(config, method=config.method.without_dense_warmup()).replace(
        output_dir=str(root / "2-experts"),
        model=str(RunFolder(root / "1-dense").model),
        random_init=False,
        head_warmup_steps=0,
    )
    return [dense, own]


def _check_same_sequence(root: Path, stages: Sequence[TrainConfig]) -> None:
    """Refuse a folder with runs of another sequence."""
    names = [Path(stage.run.output_dir or "").name for stage in stages]
    others = [path for path in sorted(root.glob("[0-9]*-*")) if path.name not in names]
    if other := next((path for path in others if RunFolder(path).begun), None):
        raise UserError(
            f"--output_dir {root} holds another sequence: {other.name} is none of {', '.join(names)}. Give "
            "another --output_dir, or the corpora of that one in their order"
        )


def _checked(config: TrainConfig) -> list[str]:
    """Return the names of the domains, after a check of everything that only later domains need."""
    assert config.model.model is not None
    paths = config.data.corpus or []
    names = [Path(path).resolve().name for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"--corpus: two of the domains are called {name!r}; give each folder a name of its own"
            )
    if config.data.eval_corpus:
        raise UserError(
            f"--eval_corpus {config.data.eval_corpus} can't be that of {len(paths)} domains: leave it out, "
            "each domain's own held-out part is used (tools/shard_corpus.py --validation_share)"
        )
    if config.run.resume not in ("auto", "never"):
        raise UserError(f"--resume {config.run.resume}: a sequence resumes from its own folder; leave it out")
    load_model_config(config.model.model)
    tokenizer = load_tokenizer(config.model.model)
    for path in paths:
        open_corpus(path, tokenizer)
    return names


def _domain(config: TrainConfig, folders: list[Path], number: int) -> TrainConfig:
    """Return the settings of one domain's run: from the last model, protected by all importances so far."""
    corpora, earlier = config.data.corpus or [], folders[:number]
    seen = [
        f"{Path(path).resolve().name}={held_out_part(Path(path))}"
        for path in corpora[:number]
        if held_out_part(Path(path))
    ]
    values: dict[str, Any] = {
        "corpus": [corpora[number]],
        "output_dir": str(folders[number]),
        "also_evaluate": [*(config.data.also_evaluate or []), *seen] or None,
    }
    if earlier:
        values |= {"model": str(RunFolder(earlier[-1]).model), "random_init": False, "head_warmup_steps": 0}
        if isinstance(config.method, PriorImportanceSettings):
            first = RunFolder(earlier[0]).importance  # of general knowledge
            given = config.method.prior_importance or [str(first)]
            values["prior_importance"] = [*given, *(str(RunFolder(run).importance_after) for run in earlier)]
    return config.replace(**values)


def _complete(settings: TrainConfig, stages: Sequence[TrainConfig]) -> bool:
    """Return whether a run has ended; one with other settings is refused.

    The last may be extended to more steps. Another is what the next one started from.
    """
    folder = RunFolder(Path(settings.run.output_dir or ""))
    if not (folder.report.exists() and folder.model.exists()):
        return False
    last = settings is stages[-1]
    folder.check(settings, allowed=may_extend if last else lambda difference: False)
    return not last or finished_steps(folder) == settings.optimization.max_steps


def _finish(config: TrainConfig, stages: list[TrainConfig]) -> None:
    """Write ``sequence.json`` and one report of all runs, and print each domain's losses after every run."""
    folders = [RunFolder(Path(stage.run.output_dir or "")) for stage in stages]
    root, names = folders[0].path.parent, [Path(path).resolve().name for path in config.data.corpus or []]
    summaries = [read_summary(folder) for folder in folders]
    losses, general = losses_after_each(summaries, names)
    figures = {"domains": names, "losses": losses, "general": general}
    write_text(root / "sequence.json", json.dumps(figures, indent=2) + "\n")
    write_report([folder.path for folder in folders], root / "report.html")
    console = Console(highlight=False)
    console.print(closing_table(names, losses, general))
    console.print(f"{'models':>12}: {', '.join(str(folder.model) for folder in folders)}", soft_wrap=True)
    console.print(f"{'report':>12}: {root / 'report.html'}", soft_wrap=True)


def closing_table(
    names: Sequence[str], losses: Mapping[str, Sequence[float | None]], general: Sequence[float | None]
) -> Table:
    """Make a table of what ``losses_after_each`` returns; without general text it has no column for it."""
    columns = {"after": list(names), **{name: [*map(_figure, losses[name])] for name in names}}
    if any(value is not None for value in general):
        columns["general"] = [*map(_figure, general[1:])]
    table = Table(title="held-out loss after each domain")
    for column in columns:
        table.add_column(column, justify="left" if column == "after" else "right")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def losses_after_each(
    summaries: Sequence[dict[str, Any]], names: Sequence[str]
) -> tuple[dict[str, list[float | None]], list[float | None]]:
    """Follow each domain's held-out loss, and that on general text, through a sequence of runs.

    Args:
        summaries: The content of ``summary.json`` of each run.
        names: The names of the domains, one a run.

    Returns:
        Losses by domain, one after each run; losses on general text before the first run and after each. None
        where there is none on the text that the domain's own run (of general text: the first) was scored on.

    """

    def on_text(summary: dict[str, Any], name: str, text: dict[str, Any] | None, when: str) -> float | None:
        if text is None or summary["texts"].get(name) != text:
            return None
        figure: float | None = summary.get(f"{name}_loss", {}).get(when)
        return figure

    losses: dict[str, list[float | None]] = {}
    for own, name in enumerate(names):
        text = summaries[own]["texts"].get("domain")
        losses[name] = [
            on_text(summary, "domain" if number == own else name, text, "after")
            for number, summary in enumerate(summaries)
        ]
    text = summaries[0]["texts"].get("general")
    after = [on_text(summary, "general", text, "after") for summary in summaries]
    return losses, [on_text(summaries[0], "general", text, "before"), *after]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
