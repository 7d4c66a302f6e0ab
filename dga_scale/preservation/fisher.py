"""The diagonal empirical Fisher of the LM loss, which weighs EWC's penalty."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dga_scale.backbone.anatomy import Anatomy
from dga_scale.corpus.loading.batches import Batch
from dga_scale.corpus.loading.masking import IGNORED
from dga_scale.errors import UserError
from dga_scale.preservation.fragments import Fragment, Reduce
from dga_scale.preservation.importance import LOSS_SCALE
from dga_scale.preservation.weight_regularisation import FragmentKey, key_of

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
_LOWEST, _HIGHEST, _BINS_A_DECADE = -40, 20, 20
"""Range and bins of the histogram of log10 F."""


class LanguageModel(Protocol):
    """The interface that the Fisher needs of ``objectives.training_model.TrainingModel``."""

    lm: PreTrainedModel
    anatomy: Anatomy
    training: bool

    def eval(self) -> Any: ...
    def train(self, mode: bool = True) -> Any: ...
    def __call__(self, inputs: Batch, *, compute: Callable[[Batch], Any]) -> Any: ...


@dataclass(frozen=True)
class Fisher:
    """The diagonal empirical Fisher of the LM loss.

    Attributes:
        values: (n,) fp32, by fragment of this rank, on its device.
        mean: The mean over all entries of the model, before any normalisation.
        log10_quantiles: The log10 of the quantiles of ``values`` above 0 over the whole model, to within
            1/40, by quantile. For the log: a penalty's weight transfers between models only as far as these
            are alike.
        zeros: The share of entries that are exactly 0: weights that no example used.
        examples: The number of rows measured on, over all ranks.

    """

    values: dict[FragmentKey, Tensor]
    mean: float
    log10_quantiles: dict[float, float]
    zeros: float
    examples: int


def measure_fisher(
    model: LanguageModel,
    batches: Iterable[Batch],
    fragments: Sequence[Fragment],
    reduce: Reduce = lambda tensor: tensor,
    *,
    normalize: bool = True,
) -> Fisher:
    """Measure F_i = mean over examples of (d loss(x) / d theta_i)^2, in eval mode (dropout off).

    loss(x) is the mean cross-entropy of one example's labels: gradients are squared example by example, so
    batch size, order and number of ranks don't matter. No ``.grad`` is touched. Each example is one forward
    and one backward pass, and one sum over ranks of the whole model's squares.

    Memory on each rank while it runs, besides what it returns: one example's gradient of the whole model in
    the model's dtype (under ZeRO-3, too), and the largest parameter in fp32.

    Args:
        model: The model as trained, at the weights that the penalty starts from. DeepSpeed:
            ``engine.module``.
        batches: The batches of this rank, on the model's device; every rank the same number of the same size.
            Examples without labels are there to fill up and don't count.
        fragments: The fragments of this rank.
        reduce: The function that sums over ranks.
        normalize: Whether F is scaled to mean 1 over all entries that are trained.

    Raises:
        UserError: No examples, or a gradient that is NaN, infinite, or zero everywhere.

    """
    parameters = {name: p for name, p in model.lm.named_parameters() if p.requires_grad}
    own = {f.name: f for f in fragments if f.name in parameters}
    values = {key_of(f): torch.zeros_like(f.values, dtype=torch.float32) for f in own.values()}
    training, examples = model.training, 0
    model.eval()
    try:
        for batch in batches:
            for row in range(len(batch.input_ids)):
                gradients, counts = _example_gradients(model, batch, row, list(parameters.values()))
                examples += counts
                for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                    squares = reduce(_squares(parameter, gradient))  # (entries,)
                    if name in own:
                        fragment = own[name]
                        span = slice(fragment.start, fragment.start + fragment.values.numel())
                        values[key_of(fragment)] += squares[span].to(fragment.values.device)
    finally:
        model.train(training)
    total = int(reduce(torch.tensor(examples, device=_device(own))))
    if total == 0:
        raise UserError("the Fisher was measured on no example: give --general_corpus at least one row")
    for squares in values.values():
        squares /= total
    return _described(values, total, reduce, normalize, _device(own))


def _device(fragments: Mapping[str, Fragment]) -> torch.device:
    return next((f.values.device for f in fragments.values()), torch.device("cpu"))


def _example_gradients(
    model: LanguageModel, batch: Batch, row: int, parameters: list[nn.Parameter]
) -> tuple[Sequence[Tensor | None], int]:
    """Return one row's gradients, times LOSS_SCALE, and whether it counts (1) or has no label (0)."""
    labels = batch.labels.masked_fill(batch.label_rows != row, IGNORED)  # (N,)
    counts = bool((labels != IGNORED).any())
    loss = model(batch, compute=lambda inputs: _example_loss(model, inputs, row, labels))
    # The graph is walked without labels too: ZeRO-3's gathers are collective.
    scale = LOSS_SCALE if counts else 0.0
    return torch.autograd.grad(loss * scale, parameters, allow_unused=True), int(counts)


def _example_loss(model: LanguageModel, inputs: Batch, row: int, labels: Tensor) -> Tensor:
    """Mean cross-entropy of one row's labels, scalar fp32; 0 without.

    ``labels`` (N,) are the batch's, IGNORED where they are another row's.
    """
    trunk, own = model.anatomy.trunk(model.lm), slice(row, row + 1)
    hidden = trunk(
        input_ids=inputs.masked_ids[own], attention_mask=inputs.attention_mask[own]
    ).last_hidden_state  # (1, T, H)
    tokens = inputs.positions - row * hidden.shape[1]
    logits = model.anatomy.lm_logits(model.lm, hidden[0, tokens.masked_fill(labels == IGNORED, 0)])  # (N, V)
    losses = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return losses / (labels != IGNORED).sum().clamp(min=1)


def _squares(parameter: nn.Parameter, gradient: Tensor | None) -> Tensor:
    """Square one example's gradient: (entries of the parameter,) fp32; zeros where it was not used."""
    if gradient is None:
        entries = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 has taken its content away
        return torch.zeros(entries, device=parameter.device)
    return (gradient.float() / LOSS_SCALE).square_().flatten()


def _described(
    values: dict[FragmentKey, Tensor], examples: int, reduce: Reduce, normalize: bool, device: torch.device
) -> Fisher:
    """Scale F to mean 1 if asked, and describe it. Sums over ranks count copies alike."""
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # of F, of its entries, of zeros
    bins = torch.zeros((_HIGHEST - _LOWEST) * _BINS_A_DECADE, dtype=torch.float64, device=device)
    for squares in values.values():
        zeros = squares == 0
        sums += torch.stack(
            [squares.sum(dtype=torch.float64), torch.full_like(sums[0], len(squares)), zeros.sum().double()]
        ).to(device)
        bin_indices = (squares[~zeros].log10() - _LOWEST) * _BINS_A_DECADE
        bins += torch.bincount(bin_indices.long().clamp(0, len(bins) - 1), minlength=len(bins)).to(device)
    total, entries, zero = reduce(sums).tolist()
    mean = total / entries
    if not (0 < mean < math.inf):
        raise UserError(
            f"the Fisher of the LM loss has mean {mean:g}: its gradients are NaN, infinite or all zero. "
            "Check that the model is sound, and use bf16 or fp32 where it is fp16"
        )
    scale = 1 / mean if normalize else 1.0
    for squares in values.values():
        squares *= scale
    quantiles = dict(_quantiles(reduce(bins).cpu(), math.log10(scale)))
    return Fisher(values, mean, quantiles, zero / entries, examples)


def _quantiles(bins: Tensor, shift: float) -> Iterator[tuple[float, float]]:
    shares = bins.cumsum(0) / bins.sum()
    for quantile in QUANTILES:
        bin_index = int((shares >= quantile).nonzero()[0])
        yield quantile, _LOWEST + (bin_index + 0.5) / _BINS_A_DECADE + shift
