"""Protection of a model's units while it learns something new: importance, soft-masks, movement.

DGA (arXiv 2301.08986) and DAS (arXiv 2302.03241) keep general knowledge by letting the units that carry it
learn less: a unit with protection ``a`` in [0, 1] learns 1 - a of what it would. ``Protection`` is all of
that for one model. It needs no DeepSpeed: a Hugging Face model and a torch optimizer will do.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from dga_scale.backbone.anatomy import Anatomy, anatomy_of
from dga_scale.backbone.gates import Gates
from dga_scale.corpus.loading.batches import Batch
from dga_scale.preservation.fragments import Fragment, Reduce
from dga_scale.preservation.importance import (
    GatedModel,
    Importance,
    combined_protection,
    measure_importance,
)
from dga_scale.preservation.movement import EffectiveProtection, MovementTracker
from dga_scale.preservation.soft_mask import Factors, GradientMask, UpdateMask, mask_factors
from dga_scale.preservation.stepped_weights import SteppedWeights, TorchWeights

SOFT_MASKS = ("gradient", "update", "none")
"""What 1 - a is multiplied with: a unit's gradient (the papers' formula), the step that the optimizer makes
of it, or nothing."""


class Protection:
    """The protection of a model's units: their importance, their soft-masks and their movement.

    Example::

        model = AutoModelForMaskedLM.from_pretrained("bert-base-uncased").train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        protection = Protection(model, soft_mask="update")
        protection.attach(optimizer)
        protection.protect(protection.measure(general_batches))
        for batch in domain_batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(protection.effective()["heads"].relative)  # (layers, heads), near 1 - a

    It holds the one copy of ``a`` that a program has: masks are made of it, and gated views of the model read
    it (``on``).

    Args:
        model: The model, whose parameters get hooks here with ``soft_mask`` "gradient"; under DeepSpeed make
            it before the engine, whose own hooks have to come later.
        anatomy: The places of its units; None: found from its architecture.
        kinds: The kinds of unit that may be protected.
        soft_mask: One of ``SOFT_MASKS``. Adam divides a constant factor on the gradient out again, so
            "gradient" protects little under it; "update" does what it says with any optimizer.
        kv_protection: "min", "max" or "mean": the protection of a row that several units share, as the
            key/value heads of a grouped-query model are.
        reduce: The function that sums a tensor over ranks; every rank then has to call the methods that
            measure. Default: one process.

    Raises:
        UserError: An architecture whose units are not known.
        ValueError: An unknown ``soft_mask``.

    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        anatomy: Anatomy | None = None,
        kinds: Sequence[str] = ("heads",),
        soft_mask: str = "update",
        kv_protection: str = "min",
        reduce: Reduce = lambda tensor: tensor,
    ) -> None:
        if soft_mask not in SOFT_MASKS:
            raise ValueError(f"soft_mask is one of {', '.join(SOFT_MASKS)}, not {soft_mask!r}")
        self.model = model
        self.anatomy = anatomy or anatomy_of(model)
        self.kinds = tuple(kinds)
        self.soft_mask = soft_mask
        self._kv_protection = kv_protection
        self._reduce = reduce
        self._a: dict[str, Tensor] = {}
        self._weights: SteppedWeights | None = None
        self._movement: MovementTracker | None = None
        self._update_mask: UpdateMask | None = None
        self._gradient_mask: GradientMask | None = None
        if soft_mask == "gradient":
            self._gradient_mask = GradientMask(model.named_parameters(), self.anatomy, self.kinds)

    def attach(self, optimizer: Optimizer | SteppedWeights) -> None:
        """Attach to the weights that an optimizer steps: their movement counts from here.

        Call it once, when the model is on the device it trains on. It keeps a copy of the rows that units
        have to themselves, to measure their movement (attention heads: a quarter of the attention's weights).

        Args:
            optimizer: A torch optimizer of the model's parameters, or where another keeps its weights.

        """
        assert self._weights is None, "one protection watches one optimizer"
        self._weights = TorchWeights(self.model, optimizer) if isinstance(optimizer, Optimizer) else optimizer
        self._movement = MovementTracker(self.anatomy, self._weights.fragments(), self.kinds)
        if self.soft_mask == "update":
            self._weights.around_steps(self._before_step, self._after_step)

    def measure(
        self,
        batches: Iterable[Batch],
        *,
        loss: str = "proxy_kl",
        distribution: str = "vocabulary",
        model: GatedModel | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Importance:
        """Measure the importance of the units: see ``importance.measure_importance``.

        Args:
            batches: The batches of this rank, on the model's device; of text whose knowledge is to be kept.
            loss: "proxy_kl", with the model in train mode; "mlm", in eval mode.
            distribution: The outputs that proxy KL compares.
            model: The model inside its training module, where one has the gates already and gathers its
                parameters (DeepSpeed: ``engine.module``); None: gates are put on the model meanwhile.
            settings: Further settings that the result keeps, such as the identity of model and corpus.

        Raises:
            UserError: The model has no dropout (proxy KL); no examples; a NaN or infinite importance.
            ValueError: Proxy KL in eval mode; an unknown loss or distribution.

        """
        options: dict[str, Any] = {
            "kinds": self.kinds,
            "loss": loss,
            "distribution": distribution,
            "reduce": self._reduce,
            "settings": settings,
        }
        if model is not None:
            return measure_importance(model, batches, **options)
        with _gated(self.model, self.anatomy, self.kinds) as gated:
            return measure_importance(gated, batches, **options)

    def protect(self, *importances: Importance, squash: str = "clip") -> Importance:
        """Protect each unit by the largest protection that any importance gives it.

        Args:
            importances: One importance or several, of general knowledge and of what was learnt since (DAS).
            squash: The function from importance to ``a``: see ``Importance.protection``.

        Returns:
            The importance that counts: the one given, or of several each unit's largest, relative to its
            layer's mean.

        Raises:
            UserError: Importances of units that the model does not have, of unlike kinds, or without spread.

        """
        if len(importances) == 1:
            (importance,) = importances
            importance.check_units(self.anatomy)
            self.set(importance.protection(squash))
        else:
            importance, a = combined_protection(importances, self.anatomy, squash)
            self.set(a)
        return importance

    def set(self, a: Mapping[str, Tensor]) -> None:
        """Protect the units from the next backward pass on.

        Args:
            a: (layers, units) in [0, 1] for each of the kinds. 0: a unit learns as if there were no mask; 1:
                with ``soft_mask`` "update" it does not move, to the last bit.

        Raises:
            ValueError: Other kinds than this protection is for, a wrong shape, or values outside [0, 1].

        """
        if a.keys() != set(self.kinds):
            given = ", ".join(sorted(a)) or "nothing"
            raise ValueError(f"protection of {given}: give that of {', '.join(self.kinds) or 'no kind'}")
        factors = mask_factors(self.anatomy, a, self._kv_protection)
        self._a = {kind: values.detach().float() for kind, values in a.items()}
        if self._gradient_mask:
            self._gradient_mask.set(factors)
        elif self.soft_mask == "update":
            self._update_mask = UpdateMask(self.anatomy, factors, self.kinds)

    @property
    def a(self) -> Mapping[str, Tensor]:
        """The protection (layers, units) fp32 of each kind; empty as long as nothing is protected."""
        return self._a

    def on(self, device: torch.device) -> Mapping[str, Tensor]:
        """Return ``a`` after moving it to a device, where it stays: gates of each forward pass read it."""
        self._a = {kind: values.to(device) for kind, values in self._a.items()}
        return self._a

    @property
    def factors(self) -> Factors:
        """The soft-mask's factors by parameter; empty without one."""
        mask = self._gradient_mask or self._update_mask
        return mask.factors if mask else {}

    def effective(self) -> dict[str, EffectiveProtection]:
        """Compare each unit's movement since ``attach`` with its protection, by kind.

        Every rank has to call it. Empty where no optimizer is attached or nothing is protected yet.
        """
        if self._movement is None or self._weights is None or not self._a:
            return {}
        return self._movement.effective_protection(self._weights.fragments(), self._a, self._reduce)

    def applied_over_proposed(self) -> dict[str, Tensor]:
        """Compare the updates applied to each unit with those the optimizer proposed, since the last call.

        Returns:
            (layers, units) by kind, on the CPU; empty where the soft-mask is not on updates. Every rank has
            to call it.

        """
        return self._update_mask.applied_over_proposed(self._reduce) if self._update_mask else {}

    def _before_step(self, fragments: Sequence[Fragment]) -> None:
        if self._update_mask:
            self._update_mask.before_step(fragments)

    def _after_step(self, fragments: Sequence[Fragment]) -> None:
        if self._update_mask:
            self._update_mask.after_step(fragments)


@contextmanager
def _gated(model: PreTrainedModel, anatomy: Anatomy, kinds: Sequence[str]) -> Iterator[GatedModel]:
    """A plain model with gates on its units, which are taken off again."""
    gated = _Gated(model, anatomy, kinds)
    try:
        yield gated
    finally:
        gated.gates.remove()


class _Gated(nn.Module):
    """A plain model with the interface that importance needs: see ``GatedModel``."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, kinds: Sequence[str]) -> None:
        super().__init__()
        self.lm = model
        self.anatomy = anatomy
        self.gates = Gates(model, anatomy, kinds)

    def forward(self, inputs: Batch, *, compute: Callable[[Batch], Any]) -> Any:
        return compute(inputs)
