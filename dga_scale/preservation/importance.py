"""The importance of units: the gradient of a loss with respect to virtual gates, per example.

DGA (arXiv 2301.08986) measures it once, before training, by proxy KL: how much the output of the model
differs between two dropout draws, and how each unit's gate changes that. DAS (arXiv 2302.03241) measures a
domain just learnt by the masked LM loss.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from dga_scale.backbone.anatomy import Anatomy
from dga_scale.backbone.gates import Gates
from dga_scale.corpus.loading.batches import Batch
from dga_scale.corpus.loading.masking import IGNORED
from dga_scale.errors import UserError
from dga_scale.preservation.divergence import kl_divergence
from dga_scale.preservation.fragments import Reduce
from dga_scale.preservation.jackknife import GroupSums, standard_error
from dga_scale.storage.checked_tensors import load_tensors, save_tensors

LOSSES = ("proxy_kl", "mlm")
DISTRIBUTIONS = ("vocabulary", "hidden", "sequence")
SQUASHES = ("clip", "abs", "minmax")

LOSS_SCALE = 2.0**10
"""Keeps the gradients of fp16 activations from underflow; a power of two changes no digit of the others."""

SAME_OUTPUT = 1e-4
"""Hidden states of two dropout draws that differ relatively by less come from a model without dropout."""

LEFT_OUT = "left_out:"
"""What stands before the kind in the names of the tensors of ``Importance.left_out`` in its file."""

NO_SPREAD = 1e-6
"""Standard deviation over mean below which the units of a layer differ by fp32 rounding only."""


class GatedModel(Protocol):
    """The interface that importance needs of ``objectives.training_model.TrainingModel``.

    Calling it with a batch and ``compute`` returns ``compute(batch)``, run inside the module's call: that is
    where ZeRO-3 has the parameters at hand.
    """

    lm: PreTrainedModel
    anatomy: Anatomy
    gates: Gates

    def parameters(self) -> Iterator[nn.Parameter]: ...
    def __call__(self, inputs: Batch, *, compute: Callable[[Batch], Any]) -> Any: ...


@dataclass(frozen=True)
class Importance:
    """The importance of a model's units.

    Attributes:
        values: The mean over examples of |d loss / d gate|, (layers, units) fp32 on the CPU, by kind of unit.
        settings: The way it was measured and the model and text of it; plain JSON values.
        left_out: The values without each of up to ``GROUPS`` groups of examples, (groups, layers, units) fp32
            on the CPU, by kind of unit. Empty of a single group, and of files of earlier versions.

    """

    values: dict[str, Tensor]
    settings: dict[str, Any]
    left_out: dict[str, Tensor] = field(default_factory=dict)

    def protection(self, squash: str = "clip") -> dict[str, Tensor]:
        """Squash importance into the protection ``a`` in [0, 1], (layers, units) by kind.

        ``tanh`` of the z-score within the layer (DGA's normalisation, population standard deviation), which
        is negative for units below the layer's mean. "clip" sets those to 0; "abs" takes the absolute
        value, as the released code does, and protects the least important unit as much as the most;
        "minmax" stretches each layer to [0, 1].

        Raises:
            UserError: A layer whose units all have the same importance (all zero, too), or a value that is
                NaN or infinite.
            ValueError: Unknown ``squash``.

        """
        if squash not in SQUASHES:
            raise ValueError(f"squash is one of {', '.join(SQUASHES)}, not {squash!r}")
        protection = {}
        for kind, values in self.values.items():
            _check_finite(kind, values)
            mean = values.mean(dim=1, keepdim=True)
            deviation = values.std(dim=1, keepdim=True, correction=0)
            if bool((flat := deviation <= NO_SPREAD * mean).any()):
                raise UserError(
                    f"importance of {kind} in layer {_layers(flat)} has no spread (every unit has "
                    f"{mean[flat][0].item():.3g}): nothing distinguishes important units; measure "
                    "it on more text (--importance_samples), and check that the model is pretrained"
                )
            protection[kind] = _squashed(values, squash)
        return protection

    def standard_errors(self, squash: str = "clip") -> dict[str, tuple[Tensor, Tensor]]:
        """Estimate the standard errors of the values and of the protection ``a`` that comes of them.

        The jackknife goes through the squash whole, with its mean and deviation over the layer; where "clip"
        and "abs" fold, near the layer's mean, it says too much rather than too little.

        Returns:
            Two tensors (layers, units) by kind of unit; empty where ``left_out`` is.

        """
        return {
            kind: (standard_error(values), standard_error(_squashed(values, squash)))
            for kind, values in self.left_out.items()
        }

    def check_units(self, anatomy: Anatomy) -> None:
        """See that the units are those of a model.

        Raises:
            UserError: It has another number of layers or units.

        """
        for kind, values in self.values.items():
            expected = anatomy.unit_shape(kind)
            if tuple(values.shape) != expected:
                raise UserError(
                    f"--prior_importance of {kind} has the shape {tuple(values.shape)}, the model has "
                    f"{expected}: it was measured on another model; give the files of this one"
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, two tensors a kind, settings as JSON in its metadata, or nothing."""
        tensors = self.values | {LEFT_OUT + kind: values for kind, values in self.left_out.items()}
        save_tensors(tensors, Path(path), {"settings": json.dumps(self.settings, sort_keys=True)})

    @staticmethod
    def load(path: str | os.PathLike[str], kinds: Sequence[str] | None = None) -> "Importance":
        """Load the importance that ``save`` wrote: that of some kinds of unit, or of all in the file.

        Raises:
            UserError: No such file, a damaged one, not a file of importances, or one without such a kind.

        """
        try:
            tensors, metadata = load_tensors(Path(path))
            settings = json.loads(metadata["settings"])
            if not isinstance(settings, dict):
                raise ValueError("its settings are no object")
            values = {name: tensor for name, tensor in tensors.items() if not name.startswith(LEFT_OUT)}
            left_out = {kind: tensors[LEFT_OUT + kind] for kind in values if LEFT_OUT + kind in tensors}
            for kind, tensor in values.items():
                if tensor.dtype != torch.float32 or tensor.dim() != 2 or not tensor.numel():
                    raise ValueError(f"{kind} is no matrix of (layers, units) in float32")
        except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}" if Path(path).is_file() else "no such file"
            raise UserError(
                f"it can't be read as importances ({reason}). Give an importance.safetensors of a run; a run "
                "measures its own again where it is removed",
                path,
            ) from None
        missing = [kind for kind in kinds or () if kind not in values]
        if missing:
            raise UserError(
                f"it holds the importance of {', '.join(sorted(values))}, not of {', '.join(missing)}, which "
                f"this run protects: give a file measured for them, or --protect {' '.join(sorted(values))}",
                path,
            )
        wanted = kinds or list(values)
        return Importance(
            {kind: values[kind] for kind in wanted},
            settings,
            {kind: left_out[kind] for kind in wanted if kind in left_out},
        )


def _squashed(values: Tensor, squash: str) -> Tensor:
    """Return the protection of values (..., layers, units): tanh of the z-score in the layer, squashed."""
    tiny = torch.finfo(values.dtype).tiny  # where a group is left out, a layer may be without spread
    deviation = values.std(dim=-1, keepdim=True, correction=0).clamp(min=tiny)
    a = torch.tanh((values - values.mean(dim=-1, keepdim=True)) / deviation)
    if squash == "clip":
        return a.clamp(min=0)
    if squash == "abs":
        return a.abs()
    low, high = a.amin(dim=-1, keepdim=True), a.amax(dim=-1, keepdim=True)
    return (a - low) / (high - low).clamp(min=tiny)


def combined_protection(
    importances: Sequence[Importance], anatomy: Anatomy, squash: str = "clip"
) -> tuple[Importance, dict[str, Tensor]]:
    """Return the largest protection that any importance gives each unit (DAS, arXiv 2302.03241).

    Each importance is squashed on its own, and the largest protection of a unit counts.

    Returns:
        The units' importance relative to their layer's mean, the largest of all; and the protection ``a``
        (layers, units) by kind.

    Raises:
        UserError: Importances of units that the model does not have; and as ``Importance.protection``.

    """
    for importance in importances:
        importance.check_units(anatomy)
    if len({frozenset(importance.values) for importance in importances}) > 1:
        kinds = " and ".join(", ".join(sorted(importance.values)) for importance in importances)
        raise UserError(
            f"--prior_importance: files of unlike kinds of unit ({kinds}); give files of one method"
        )
    protections = [importance.protection(squash) for importance in importances]
    relative = {
        kind: torch.stack([i.values[kind] / i.values[kind].mean(dim=1, keepdim=True) for i in importances])
        for kind in importances[0].values
    }
    largest = {kind: torch.stack([a[kind] for a in protections]).amax(dim=0) for kind in relative}
    settings = {"combined": [importance.settings for importance in importances]}
    return Importance({kind: values.amax(dim=0) for kind, values in relative.items()}, settings), largest


def measure_importance(
    model: GatedModel,
    batches: Iterable[Batch],
    *,
    kinds: Sequence[str] = ("heads",),
    loss: str = "proxy_kl",
    distribution: str = "vocabulary",
    reduce: Reduce = lambda tensor: tensor,
    settings: Mapping[str, Any] | None = None,
) -> Importance:
    """Measure I = mean over examples of |d loss(x) / d gate| (DGA, eq. of the importance).

    Each example has its own row of gates, so one backward pass gives the gradient of every example's loss,
    and the absolute value is taken before anything is averaged: batch size, order and number of ranks don't
    matter. The parameters are frozen meanwhile and no gradient of theirs is touched.

    Args:
        model: The model in train mode for proxy_kl, which compares two dropout draws. DeepSpeed:
            ``engine.module``.
        batches: The batches of this rank, on the model's device; every rank the same number of them, some
            examples may be empty (no labels: they don't count).
        kinds: The kinds of unit; the model's gates must have been made for them.
        loss: "proxy_kl", KL(f1 || f2) of two dropout draws on the clean text; "mlm", the masked LM loss on
            the masked text. Both are means within the example.
        distribution: The outputs that proxy KL compares: "vocabulary", softmax over the vocabulary at the
            batch's masked positions; "hidden", softmax over the hidden axis at every token; "sequence",
            softmax over the tokens for each hidden unit (the released code).
        reduce: The function that sums over ranks.
        settings: Further settings that the result keeps, such as the identity of model and corpus.

    Raises:
        ValueError: ``proxy_kl`` in eval mode; an unknown loss or distribution.
        UserError: The model has no dropout; no examples; a NaN or infinite importance.

    """
    if loss not in LOSSES or distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"loss {loss!r} must be in {LOSSES}, distribution {distribution!r} in {DISTRIBUTIONS}"
        )
    if loss == "proxy_kl" and not model.lm.training:
        raise ValueError(
            "proxy KL compares two dropout draws: call model.train() first, in eval mode it is 0"
        )
    anatomy = model.anatomy
    sums: dict[str, Tensor] = {}
    groups = GroupSums()
    examples: Tensor | int = 0
    with _frozen(model):
        for number, batch in enumerate(batches):
            device, size = batch.input_ids.device, len(batch.input_ids)
            gates = {
                kind: torch.ones(size, *anatomy.unit_shape(kind), device=device, requires_grad=True)
                for kind in kinds
            }
            real = _labels_by_row(batch) > 0  # (B,)
            losses, differences = _losses(model, batch, gates, loss, distribution)  # (B,), (B,)
            if loss == "proxy_kl" and number == 0:
                _check_dropout(torch.where(real, differences, 0).sum(), real.sum(), reduce)
            gradients = torch.autograd.grad(losses.sum() * LOSS_SCALE, list(gates.values()))
            for kind, gradient in zip(kinds, gradients, strict=True):
                # An example without labels only fills up the batch; its row may even be NaN, where it has
                # no token to attend to.
                sizes = torch.where(real[:, None, None], gradient.abs() / LOSS_SCALE, 0)
                sums[kind] = sums.get(kind, 0) + sizes.sum(dim=0, dtype=torch.float64)  # (layers, units)
                groups.add(kind, batch.sample_ids, sizes)
            groups.count(batch.sample_ids, real)
            examples = examples + real.sum()
    count = int(reduce(torch.as_tensor(examples)))
    if count == 0:
        raise UserError("importance was measured on no example: give it at least one row of text")
    values = {kind: (reduce(sums[kind]) / count).float().cpu() for kind in kinds}
    for kind in kinds:
        _check_finite(kind, values[kind])
    measured = {"loss": loss, "distribution": distribution, "examples": count, "kinds": list(kinds)}
    if loss == "mlm":
        del measured["distribution"]
    return Importance(values, {**(settings or {}), **measured}, groups.left_out(reduce))


def _losses(
    model: GatedModel, batch: Batch, gates: dict[str, Tensor], loss: str, distribution: str
) -> tuple[Tensor, Tensor]:
    """Return L_impt of each example (B,), and its two draws' largest relative difference (B,), detached."""

    def compute(inputs: Batch) -> tuple[Tensor, Tensor]:
        if loss == "mlm":
            losses = _masked_lm_losses(model, inputs, gates)
            return losses, torch.zeros_like(losses)
        return _proxy_kl(model, inputs, gates, distribution)

    return model(batch, compute=compute)


def _proxy_kl(
    model: GatedModel, inputs: Batch, gates: dict[str, Tensor], distribution: str
) -> tuple[Tensor, Tensor]:
    """Compute KL(f1 || f2) per example, both draws in one forward pass under the same gates."""
    doubled = {kind: rows.repeat(2, 1, 1) for kind, rows in gates.items()}
    tokens = inputs.attention_mask  # (B, T)
    hidden = _hidden(model, inputs.input_ids.repeat(2, 1), tokens.repeat(2, 1), doubled)  # (2B, T, H)
    if distribution == "vocabulary":
        positions = torch.cat([inputs.positions, inputs.positions + tokens.numel()])
        logits = _logits_at(model, hidden, positions)  # (2N, V)
        losses = _row_means(inputs, kl_divergence(*logits.chunk(2)))
    elif distribution == "hidden":
        divergence = kl_divergence(*hidden.chunk(2))  # (B, T)
        losses = (divergence * tokens).sum(dim=1) / tokens.sum(dim=1).clamp(min=1)
    else:
        padding = tokens.repeat(2, 1).unsqueeze(-1) == 0
        # Not -inf, whose product with a probability of 0 is NaN.
        logits = hidden.masked_fill(padding, torch.finfo(hidden.dtype).min).transpose(1, 2)  # (2B, H, T)
        losses = kl_divergence(*logits.chunk(2)).mean(dim=1)  # over H
    first, second = (hidden.detach() * tokens.repeat(2, 1).unsqueeze(-1)).float().chunk(2)
    differences = (first - second).abs().amax(dim=(1, 2)) / first.abs().amax(dim=(1, 2))
    return losses, differences


def _masked_lm_losses(model: GatedModel, inputs: Batch, gates: dict[str, Tensor]) -> Tensor:
    """Compute the mean cross-entropy of each example's masked positions (B,)."""
    hidden = _hidden(model, inputs.masked_ids, inputs.attention_mask, gates)
    logits = _logits_at(model, hidden, inputs.positions)  # (N, V)
    return _row_means(inputs, F.cross_entropy(logits, inputs.labels, reduction="none"))


def _row_means(inputs: Batch, values: Tensor) -> Tensor:
    """Return the mean of values (N,) over the labels of each row: (B,), 0 where it has none."""
    counted = values.masked_fill(inputs.labels == IGNORED, 0)
    sums = values.new_zeros(len(inputs.input_ids)).index_add(0, inputs.label_rows, counted)
    return sums / _labels_by_row(inputs).clamp(min=1)


def _labels_by_row(inputs: Batch) -> Tensor:
    """Count the labels of each row: (B,) long."""
    counts = inputs.labels.new_zeros(len(inputs.input_ids))
    return counts.index_add(0, inputs.label_rows, (inputs.labels != IGNORED).long())


def _hidden(model: GatedModel, ids: Tensor, attention_mask: Tensor, gates: dict[str, Tensor]) -> Tensor:
    model.gates.set(gates)
    hidden = model.anatomy.trunk(model.lm)(input_ids=ids, attention_mask=attention_mask).last_hidden_state
    model.gates.set(None)
    return hidden  # (B, T, H)


def _logits_at(model: GatedModel, hidden: Tensor, positions: Tensor) -> Tensor:
    """Return the logits (N, V) in fp32 at positions (N,): only those go through the LM head."""
    return model.anatomy.lm_logits(model.lm, hidden.flatten(0, 1).index_select(0, positions)).float()


@contextmanager
def _frozen(model: GatedModel) -> Iterator[None]:
    """Within, parameters need no gradient: none is computed and no hook of an engine runs."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _check_dropout(differences: Tensor, examples: Tensor, reduce: Reduce) -> None:
    """Refuse a model whose two draws are the same: what is left is rounding, which a z-score inflates."""
    difference = float(reduce(differences)) / max(1, int(reduce(examples)))  # mean over examples
    if difference < SAME_OUTPUT:
        raise UserError(
            f"the model has no dropout: two forward passes over the same text differ by a share of "
            f"{difference:.1g}, so proxy KL and the contrast have nothing to compare; pass --dropout 0.1"
        )


def _check_finite(kind: str, values: Tensor) -> None:
    if bool((bad := ~values.isfinite().all(dim=1)).any()):
        raise UserError(
            f"importance of {kind} in layer {_layers(bad)} is NaN or infinite: the model's weights or "
            "activations are; use bf16 or fp32 where it is fp16, and check that the checkpoint is sound"
        )


def _layers(flags: Tensor) -> str:
    return ", ".join(str(layer) for layer in flags.flatten().nonzero().flatten().tolist())
