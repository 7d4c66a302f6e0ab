"""Protection in a run: importance measured on its corpus or read where it was measured before."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from dga_scale.config.methods.shared import ProtectionSettings, prior_importance_of
from dga_scale.corpus.loading.batches import Batch
from dga_scale.corpus.loading.streams import EvalBatches
from dga_scale.errors import UserError
from dga_scale.preservation.importance import Importance
from dga_scale.train.seeds import IMPORTANCE_STREAM, seed_everything
from dga_scale.train.trainer import Trainer

SURE = 0.1
"""The standard error of ``a`` above which a run warns: other rows would protect other units."""

ADAM_UNDOES_GRADIENT_MASKS = (
    "soft_mask gradient (the papers' formula): AdamW divides each gradient by its own running size, so it "
    "largely undoes a constant factor on it; effective protection is logged. --soft_mask update masks the "
    "step that AdamW makes instead."
)


def protect(trainer: Trainer) -> None:
    """Measure importance, or read it where this run has measured it before, and protect the units.

    Raises:
        UserError: On every rank; importance that can't be measured, or is missing where a run resumes.
    """
    kinds = trainer.method.kinds
    if not kinds:
        return
    settings, cluster, protection = _settings(trainer), trainer.cluster, trainer.protection
    prior = prior_importance_of(settings)
    if prior:
        earlier = cluster.run_on_all(lambda: [Importance.load(path, kinds) for path in prior])
    else:
        path = trainer.inputs.folder.importance
        known = cluster.run_on_all(lambda: _known_importance(path, trainer))
        earlier = [known or measure(trainer, "proxy_kl", path)]
    importance = protection.protect(*earlier, squash=settings.importance_squash)
    if not trainer.resuming:
        for each in earlier:
            _log_errors(trainer, each, step=0)
    trainer.log.importance(importance.values, protection.a)
    if protection.soft_mask == "gradient" and trainer.config.optimization.optimizer == "adamw":
        trainer.log.print(ADAM_UNDOES_GRADIENT_MASKS)


def measure(trainer: Trainer, loss: str, path: Path) -> Importance:
    """Measure importance for general knowledge ("proxy_kl") or the domain ("mlm"), and save it at ``path``.

    Raises:
        UserError: See ``Protection.measure``.
    """
    settings, inputs, cluster = _settings(trainer), trainer.inputs, trainer.cluster
    batches = EvalBatches(
        inputs.corpus,
        inputs.masking,
        batch_size=inputs.resolved.micro_batch_size,
        rank=cluster.rank,
        world_size=cluster.world_size,
        max_rows=settings.importance_samples,
    )

    def on_device() -> Iterator[Batch]:
        for batch in trainer.log.track(batches, len(batches), "importance"):
            trainer.check_stop()
            yield batch.to(cluster.device)

    rows = min(settings.importance_samples, len(inputs.corpus))
    units = trainer.anatomy.in_words(trainer.method.kinds)
    trainer.log.print(f"measuring the importance of {units} on {rows} rows")
    # Proxy KL compares two dropout draws; the LM loss is measured without.
    trainer.model.train(loss == "proxy_kl")
    seed_everything(trainer.config.run.seed, IMPORTANCE_STREAM, 0, cluster.rank)
    importance = trainer.protection.measure(
        on_device(),
        model=trainer.engine.module,
        loss=loss,
        distribution=settings.importance_distribution,
        settings={
            "model": trainer.config.model.model,
            "corpus": inputs.corpus.content_hash,
            "seed": trainer.config.run.seed,
            "base_model": trainer.start.base_model,
        },
    )
    trainer.model.train()
    cluster.run_on_first(lambda: importance.save(path))
    return importance


def measure_after(trainer: Trainer) -> None:
    """Measure the domain's importance after the last step, where the method needs it and has none yet."""
    path = trainer.inputs.folder.importance_after
    if trainer.method.measures_after and not trainer.cluster.run_on_first(path.exists):
        measured = measure(trainer, "mlm", path)
        _log_errors(trainer, measured, step=trainer.config.optimization.max_steps)


def _log_errors(trainer: Trainer, importance: Importance, step: int) -> None:
    """Log how sure an importance is, and say so in a line; nothing where its file does not tell."""
    errors = importance.standard_errors(_settings(trainer).importance_squash)
    if not errors:
        return
    measured = importance.settings
    for kind, (error, of_a) in errors.items():
        trainer.log.importance_errors(
            kind,
            step=step,
            relative=torch.where(error > 0, error / importance.values[kind], 0.0),
            of_a=of_a,
            loss=measured["loss"],
            examples=measured["examples"],
        )
    largest = {kind: of_a.max().item() for kind, (_, of_a) in errors.items()}
    trainer.log.print(describe_errors(largest, measured["examples"]))


def describe_errors(largest: Mapping[str, float], rows: int) -> str:
    """Say how sure importances of so many rows are, and where they are not, how many rows would be enough.

    Args:
        largest: The largest standard error of ``a`` by kind of unit.
        rows: The number of rows that they were measured on.

    """
    kind = max(largest, key=lambda kind: largest[kind])
    line = f"importance of {rows:,} rows: largest standard error of a {largest[kind]:.2f} ({kind})"
    if largest[kind] > SURE:
        needed = math.ceil(rows * (largest[kind] / SURE) ** 2)
        line += (
            f"; above {SURE} other rows would protect other units: about {needed:,} rows are enough, raise "
            "--importance_samples or give more text"
        )
    return line


def _settings(trainer: Trainer) -> ProtectionSettings:
    settings = trainer.config.method
    assert isinstance(settings, ProtectionSettings), f"{trainer.method.name} has kinds and no such settings"
    return settings


def _known_importance(path: Path, trainer: Trainer) -> Importance | None:
    """Load the importance that this run has measured before; None where it has to be measured."""
    if trainer.resuming and not path.exists():
        raise UserError(
            f"{path} is missing: the importance that this run protects was measured on the model that it "
            "started from. Restore it, or start anew in another --output_dir"
        )
    if not path.exists():
        return None
    known = Importance.load(path, trainer.method.kinds)
    same = known.settings.get("base_model") == trainer.start.base_model
    return known if same or trainer.resuming else None
