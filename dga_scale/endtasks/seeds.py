"""Fine-tune on a task with several seeds: each seed has a file, so that a stopped command resumes."""

import dataclasses
import json
import multiprocessing
import os
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dga_scale.config.user_code import import_code, imported
from dga_scale.corpus.sharding.executor import end_with_parent
from dga_scale.corpus.shards import file_sha256
from dga_scale.endtasks.recipes import Recipe
from dga_scale.endtasks.tasks import Task, majority_share
from dga_scale.errors import UserError
from dga_scale.logging.quiet import quiet_libraries
from dga_scale.run_folder import write_text
from dga_scale.storage.checked_json import load_object
from dga_scale.storage.typed_json import check_fields
from dga_scale.streams import keep_streams


@dataclass(frozen=True)
class FineTuning:
    """The fine-tuning of a model on a task; each seed has a file in ``output``."""

    model: str
    task: Task
    recipe: Recipe
    output: Path

    def identity(self) -> dict[str, Any]:
        """Return hashes of model and task, and the recipe, by which a seed's file is used again."""
        return {
            "model": model_fingerprint(self.model),
            "task": self.task.fingerprint,
            "recipe": dataclasses.asdict(self.recipe),
        }


def run_seeds(
    model: str, task: Task, recipe: Recipe, seeds: Sequence[int], output: Path, *, jobs: int = 1
) -> dict[str, Any]:
    """Fine-tune once for each seed, ``jobs`` at a time; seeds whose file is in ``output`` are not run again.

    Returns:
        The summary of all seeds, as from ``summarize``.

    Raises:
        UserError: As ``run_missing``.
    """
    one = FineTuning(model, task, recipe, output)
    run_missing([one], seeds, jobs=jobs)
    return summarize(one, seeds)


def run_missing(fine_tunings: Sequence[FineTuning], seeds: Sequence[int], *, jobs: int = 1) -> None:
    """Run those seeds of all ``fine_tunings`` that have no file yet, ``jobs`` at a time.

    Raises:
        UserError: An output holds seeds of another model, task or recipe; or as ``finetune``.
    """
    left = []
    for each in fine_tunings:
        identity = each.identity()
        left += [
            (each, seed, identity) for seed in seeds if not _finished(_file(each.output, seed), identity)
        ]
        each.output.mkdir(parents=True, exist_ok=True)
    if jobs == 1 or len(left) < 2:
        for each, seed, identity in left:
            _run(each, seed, identity)
        return
    context = multiprocessing.get_context("spawn")  # a forked process can't use CUDA
    with ProcessPoolExecutor(min(jobs, len(left)), context, _start_worker, (jobs, imported())) as pool:
        waiting = [
            pool.submit(_run, each, seed, identity, slot) for slot, (each, seed, identity) in enumerate(left)
        ]
        try:
            for done in as_completed(waiting):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def summarize(fine_tuning: FineTuning, seeds: Sequence[int]) -> dict[str, Any]:
    """Write ``summary.json`` of finished seeds, and return its content.

    It has the mean, standard deviation (of a sample; None for one seed) and values by seed of each score.
    """
    task, recipe = fine_tuning.task, fine_tuning.recipe
    results = {seed: _read(_file(fine_tuning.output, seed)) for seed in seeds}
    names = {*results[seeds[0]]["scores"], recipe.metric}
    for seed, result in results.items():
        if result["scores"].keys() != names:
            file = _file(fine_tuning.output, seed)
            raise UserError("damaged (it lacks a score). Remove it, and run the same command again.", file)
    summary = {
        "model": fine_tuning.model,
        "task": task.name,
        "scored_on": task.scored_on,
        "metric": recipe.metric,
        "majority_share": None if task.regression else majority_share(task.test),
        "scores": {
            name: spread({seed: result["scores"][name] for seed, result in results.items()})
            for name in results[seeds[0]]["scores"]
        },
        "recipe": dataclasses.asdict(recipe),
    }
    write_text(fine_tuning.output / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def spread(values: dict[int, float]) -> dict[str, Any]:
    """Compute mean and standard deviation (of a sample; None for one value) of scores by seed."""
    numbers = list(values.values())
    return {
        "mean": statistics.fmean(numbers),
        "std": statistics.stdev(numbers) if len(numbers) > 1 else None,
        "by_seed": {str(seed): value for seed, value in values.items()},
    }


def spread_text(score: Mapping[str, Any]) -> str:
    """Format a mean with its standard deviation, where there is one: ``0.7123 ± 0.0042``."""
    return f"{score['mean']:.4f}" + ("" if score["std"] is None else f" ± {score['std']:.4f}")


def model_fingerprint(model: str) -> str:
    """Identify a model: sha256 of a folder's config and weights, or the name of a hub model."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    files = [folder / "config.json", *sorted(folder.glob("model*.safetensors"))]
    return " ".join(file_sha256(file)[:16] for file in files if file.is_file())


def _start_worker(jobs: int, code: Sequence[str]) -> None:
    import torch

    end_with_parent()
    keep_streams(lambda error: None)  # the first process says so
    quiet_libraries()
    import_code(code)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // jobs))


def _run(fine_tuning: FineTuning, seed: int, identity: dict[str, Any], slot: int = 0) -> None:
    """Fine-tune with one seed and write its file; ``slot`` spreads parallel seeds over the GPUs."""
    import torch

    from dga_scale.endtasks.finetune import finetune  # transformers' import takes seconds

    model, task, recipe = fine_tuning.model, fine_tuning.task, fine_tuning.recipe

    def print_epoch(epoch: int, loss: float, score: float | None) -> None:
        dev = "" if score is None else f", dev {recipe.metric} {score:.4f}"
        print(f"{task.name} seed {seed} epoch {epoch}/{recipe.epochs}: loss {loss:.4f}{dev}", flush=True)

    gpus = torch.cuda.device_count()
    device = torch.device("cuda", slot % gpus) if gpus else torch.device("cpu")
    result = finetune(model, task, recipe, seed, device=device, on_epoch=print_epoch)
    lines = [
        json.dumps({**dataclasses.asdict(example), "prediction": prediction}, ensure_ascii=False) + "\n"
        for example, prediction in zip(task.test, result.pop("predictions"), strict=True)
    ]
    write_text(_file(fine_tuning.output, seed).with_suffix(".predictions.jsonl"), "".join(lines))
    content = {
        "model": model,
        "task": task.name,
        "seed": seed,
        "scored_on": task.scored_on,
        "examples": {"train": len(task.train), "dev": len(task.dev), "test": len(task.test)},
        **result,
        "identity": identity,
    }
    write_text(_file(fine_tuning.output, seed), json.dumps(content, indent=2) + "\n")


def _file(output: Path, seed: int) -> Path:
    return output / f"seed-{seed}.json"


def _finished(file: Path, identity: dict[str, Any]) -> bool:
    if not file.exists():
        return False
    former = _read(file)["identity"]
    changed = [name for name in identity if former.get(name) != identity[name]]
    if changed:
        raise UserError(
            f"made with another {' and '.join(changed)}. Give another folder, or remove the file.", file
        )
    return True


def _read(file: Path) -> dict[str, Any]:
    try:
        content = load_object(file)
        check_fields(content, {"identity": dict[str, Any], "scores": dict[str, float]}, needed=True)
        if not content["scores"]:
            raise ValueError("scores is empty")
    except (OSError, ValueError) as error:
        raise UserError(f"damaged ({error}). Remove it, and run the same command again.", file) from None
    return content
