"""List a comparison's work as commands of the project, in an order that gives a usable table early."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import yaml

from benchmarks.experiments.paper_tables.settings import DomainSequence, Flags, Settings, as_flags, label
from dga_scale.endtasks.suite import BASE
from dga_scale.endtasks.tasks import load_task
from dga_scale.run_folder import write_text

PYTHON = sys.executable


@dataclass(frozen=True)
class Job:
    """One command that is run once."""

    name: str
    command: tuple[str, ...]
    inputs: str = ""
    """The other content that its result depends on."""
    extends: bool = False
    """Whether the command resumes from its own results where command or inputs have changed."""
    prepare: Callable[[], None] = lambda: None
    """The function that is called before the command."""


@dataclass(frozen=True)
class Work:
    """The folders and jobs of a comparison."""

    settings: Settings
    output: Path

    def corpus(self, name: str) -> Path:
        return self.output / "corpora" / name

    def run(self, domain: str, method: str, seed: int) -> Path:
        return self.output / "runs" / domain / f"{label(method)}-{seed}"

    def sequence_run(self, method: str, seed: int) -> Path:
        return self.output / "sequence" / f"{label(method)}-{seed}"

    def evaluation(self, domain: str) -> Path:
        """Return the folder of the scores and losses of a domain's models."""
        return self.output / "evaluation" / domain

    def jobs(self) -> Iterator[Job]:
        """Yield all jobs: sharding; by seed each domain's training and evaluation; then the sequences."""
        settings = self.settings
        yield from self._sharding()
        for number, seed in enumerate(settings.seeds, 1):
            for domain in settings.domains:
                # A merged model needs its source.
                for method in sorted(settings.methods, key=lambda name: "merge" in settings.methods[name]):
                    yield self._model(domain, method, seed)
                yield self._evaluation(domain, settings.seeds[:number])
        for seed in settings.seeds:
            if settings.sequence:
                for method in settings.sequence.methods:
                    yield from self._sequence(settings.sequence, method, seed)

    def _sharding(self) -> Iterator[Job]:
        settings = self.settings
        files = [str(Path(task) / f"{load_task(task).scored_on}.jsonl") for task in settings.tasks()]
        texts = {name: domain.text for name, domain in settings.domains.items()}
        texts |= {"general": settings.general.text}
        flags = dict.fromkeys(texts, settings.sharding)
        if settings.general.held_out:
            texts["general_held_out"] = settings.general.held_out
            flags["general_held_out"] = {**settings.sharding, "validation_share": 0}
        for name, text in texts.items():
            command = [PYTHON, "tools/shard_corpus.py", *text, "--tokenizer", settings.model]
            command += ["--output", str(self.corpus(name)), *as_flags(flags[name])]
            command += ["--exclude", *files] if files else []
            yield Job(f"shard {name}", tuple(command))

    def _model(self, domain: str, method: str, seed: int) -> Job:
        flags = dict(self.settings.methods[method])
        run = self.run(domain, method, seed)
        if "merge" in flags:
            source = self.run(domain, flags.pop("merge"), seed) / "model"
            command = [PYTHON, "tools/merge_models.py", "--base", self.settings.model, "--model", str(source)]
            command += ["--output", str(run / "model"), *as_flags(flags)]
            return Job(f"merge {domain} {method} {seed}", tuple(command))
        command = self._training(flags, seed, run, [domain])
        return Job(f"train {domain} {method} {seed}", tuple(command))

    def _training(self, flags: Flags, seed: int, output: Path, domains: Sequence[str]) -> list[str]:
        settings = self.settings
        text = json.dumps({**settings.training, **flags})
        for name in ("general", "general_held_out"):
            text = text.replace(f"{{{name}}}", str(self.corpus(name)))
        command = [*settings.launcher, "launchers/dga_train.py", "--ds_config", settings.ds_config]
        command += ["--model", settings.model, "--corpus", *(str(self.corpus(d)) for d in domains)]
        return [*command, "--output_dir", str(output), "--seed", str(seed), *as_flags(json.loads(text))]

    def _evaluation(self, domain: str, seeds: tuple[int, ...]) -> Job:
        suite, text = self.output / "suites" / f"{domain}.yaml", self._suite(domain)

        def prepare() -> None:
            suite.parent.mkdir(exist_ok=True)
            write_text(suite, text)
            # The base's scores on general tasks are the same in all domains.
            for task, other in product(self.settings.general.tasks, self.settings.domains):
                theirs, own = (self.evaluation(d) / BASE / Path(task).name for d in (other, domain))
                if theirs.is_dir() and not own.exists():
                    shutil.copytree(theirs, own)

        models = [
            f"{label(method)}={self.run(domain, method, seed) / 'model'}"
            for method in self.settings.methods
            for seed in seeds
        ]
        command = [PYTHON, "tools/evaluate.py", "--base", self.settings.model, "--model", *models]
        command += ["--suite", str(suite), "--output_dir", str(self.evaluation(domain))]
        return Job(f"evaluate {domain} {seeds[-1]}", tuple(command), text, extends=True, prepare=prepare)

    def _suite(self, domain: str) -> str:
        """Return the suite on which tools/evaluate.py scores the models of a domain."""
        settings, task = self.settings, self.settings.domains[domain].task
        general = "general_held_out" if settings.general.held_out else "general"
        recipes = settings.evaluation.task_recipes
        names = {Path(each).name for each in (task, *settings.general.tasks)}
        suite = dataclasses.replace(
            settings.evaluation,
            domain_tasks=(task,) if task else (),
            general_tasks=settings.general.tasks,
            domain_corpora=(str(self.corpus(domain)),),
            general_corpora=(str(self.corpus(general)),),
            task_recipes={name: recipes[name] for name in recipes if name in names},
        )
        return yaml.safe_dump(dataclasses.asdict(suite), sort_keys=False)

    def _sequence(self, sequence: DomainSequence, method: str, seed: int) -> Iterator[Job]:
        settings, domains, run = self.settings, sequence.domains, self.sequence_run(method, seed)
        command = self._training(sequence.methods[method], seed, run, domains)
        yield Job(f"train sequence {method} {seed}", tuple(command))
        command = [PYTHON, "tools/forgetting.py", str(run), "--task"]
        command += [f"{domain}={settings.domains[domain].task}" for domain in domains]
        evaluation = settings.evaluation
        command += as_flags({"seeds": evaluation.seeds, "jobs": evaluation.jobs, **evaluation.recipe})
        yield Job(f"forgetting {method} {seed}", tuple(command), extends=True)
