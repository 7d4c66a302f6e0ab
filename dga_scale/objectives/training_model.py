"""The language model with its objective: one module, which is what DeepSpeed trains."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dga_scale.backbone.anatomy import Anatomy
from dga_scale.backbone.gates import Gates
from dga_scale.backbone.packed_rows import last_hidden_states
from dga_scale.corpus.loading.masking import IGNORED
from dga_scale.objectives.cross_entropy import cross_entropies
from dga_scale.objectives.grad_cache import CachedContrast
from dga_scale.objectives.method import LM_VIEW, ForwardOutput, Method
from dga_scale.objectives.views import ModelInputs, States, View, run_views
from dga_scale.preservation.importance import InputTensors


class TrainingModel(nn.Module):
    """A language model that returns its training loss.

    All that a run computes goes through a call of this module, importance and evaluation too (``compute``),
    so that ZeRO-3, which hooks the call, always has the parameters at hand. Parameters are named ``lm.`` +
    their name in the Hugging Face model.

    Args:
        lm: the language model.
        anatomy: its anatomy.
        method: the objective; its kinds of unit can be gated and protected.
        teacher: a frozen model of the same anatomy, for methods that learn from one; always in eval mode.
        split_views: one pass of the trunk for each view instead of one for all.

    """

    def __init__(
        self,
        lm: PreTrainedModel,
        anatomy: Anatomy,
        method: Method,
        *,
        teacher: PreTrainedModel | None = None,
        split_views: bool = False,
    ) -> None:
        super().__init__()
        self.lm = lm
        self.anatomy = anatomy
        self.method = method
        self.gates = Gates(lm, anatomy, method.kinds)
        self.teacher = teacher
        if teacher is not None:
            teacher.requires_grad_(False).eval()
        self.split_views = split_views
        # No buffers: DeepSpeed would round them to bf16 with the model.
        self.protection: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> "TrainingModel":
        """As ``nn.Module.train``; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def set_protection(self, protection: Mapping[str, Tensor]) -> None:
        """Set ``a`` (layers, units) by kind: the gates of the gated views from here on."""
        self.protection = {kind: a.detach().float() for kind, a in protection.items()}

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block in the backward pass, under its forward pass's gates and dropout draws."""
        options = {"use_reentrant": False, "context_fn": self.gates.checkpoint_contexts}
        with warnings.catch_warnings():
            # The name that replaces it came after transformers 5.20; this one stays until 6.
            warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)
            self.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)

    def forward(
        self,
        input_ids: Tensor,
        masked_ids: Tensor,
        attention_mask: Tensor,
        positions: Tensor,
        labels: Tensor,
        sources: Tensor | None = None,
        mixed_rows: Tensor | None = None,
        mixed_slots: Tensor | None = None,
        packed: Tensor | None = None,
        padded: bool = True,
        *,
        masked: Sequence[int] = (1,),
        passes: float = 1.0,
        cached: CachedContrast | None = None,
        compute: Callable[[ModelInputs], Any] | None = None,
    ) -> Any:
        """Training loss of one micro-batch on this rank.

        Args:
            input_ids, masked_ids, attention_mask: (B, T).
            positions, labels: (N,), positions in the flattened (B, T), labels -100 where there is none.
            sources, mixed_rows, mixed_slots, packed, padded: see ``ModelInputs``; left out: one corpus, rows
                as they stand.
            masked: labels of the global batch, by source.
            passes: ranks * micro-steps of a global batch. DeepSpeed takes the mean of the gradients over
                them; times this, a sum over this pass's positions counts towards one over the global batch.
            cached: of the contrast over all micro-steps, for this micro-batch; None: it is of this pass only.
            compute: run this on the inputs and return its result, instead of the loss.

        Returns:
            the loss (scalar, fp32, with gradient), and its terms by name, detached and unweighted: "mlm",
            "mlm/SOURCE" where there are several, and those of the method. A term's mean over ranks and
            micro-steps is its value on the global batch.

        """
        if sources is None or mixed_rows is None or mixed_slots is None:
            sources = positions.new_zeros(len(input_ids))
            mixed_rows, mixed_slots = positions.new_zeros(1), positions.new_full((1,), -1)
        inputs = ModelInputs(
            input_ids,
            masked_ids,
            attention_mask,
            positions,
            labels,
            sources,
            mixed_rows,
            mixed_slots,
            packed,
            padded,
        )
        if compute is not None:
            return compute(inputs)
        states = self._read(inputs, cached)
        logits = self._logits(self.lm, states.hidden[LM_VIEW.name], positions)
        loss, logged = self._lm_loss(logits, inputs, masked, passes)
        output = ForwardOutput(
            inputs=inputs,
            hidden=states.hidden,
            embeddings=states.embeddings,
            trunk=self.anatomy.trunk(self.lm),
            lm_logits=logits,
            teacher=partial(self._teacher_hidden, inputs),
            teacher_logits=self._teacher_logits,
            masked=masked,
            passes=passes,
        )
        contrast = self.method.contrast()
        if contrast is not None:
            pooled = contrast.pooled(states.hidden, inputs)
            value = contrast.loss(pooled) if cached is None else cached.term(pooled)
            loss = loss + contrast.weight * value
            logged[contrast.name] = value.detach()
        for name, term in self.method.terms(output).items():
            loss = loss + term.weight * term.value
            logged[name] = term.value.detach()
        return loss, logged

    def contrasted(self, inputs: ModelInputs) -> tuple[Tensor, ...]:
        """States (B, H) of the contrast's sides; dropout is drawn as ``cached`` draws it again."""
        contrast = self.method.contrast()
        assert contrast is not None, "the method contrasts no examples"
        return contrast.pooled(self._run(contrast.views, inputs).hidden, inputs)

    def _read(self, inputs: ModelInputs, cached: CachedContrast | None) -> States:
        """All readings: in one pass, or those contrasted apart where they repeat an earlier pass."""
        contrast, views = self.method.contrast(), self.method.views()
        if cached is None or contrast is None:
            return self._run(views, inputs)
        with cached.repeated_draws():
            states = self._run(contrast.views, inputs)
        others = [view for view in views if view not in contrast.views]
        if others:
            apart = self._run(others, inputs)
            states = States(states.hidden | apart.hidden, states.embeddings | apart.embeddings)
        return states

    def _run(self, views: Sequence[View], inputs: ModelInputs) -> States:
        device = inputs.input_ids.device
        self.protection = {kind: a.to(device) for kind, a in self.protection.items()}  # moves once
        trunk = self.anatomy.trunk(self.lm)
        return run_views(trunk, self.gates, views, inputs, self.protection, split=self.split_views)

    def _lm_loss(
        self, logits: Tensor, inputs: ModelInputs, masked: Sequence[int], passes: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of logits (N, V), weighted by source as the method says; and what is logged."""
        losses = cross_entropies(logits, inputs.labels)  # (N,)
        if len(masked) == 1:
            loss = losses.sum() * (self.method.token_weights(masked)[0] * passes)
            return loss, {"mlm": loss.detach()}
        own = inputs.sources[inputs.rows]  # (N,)
        sums = losses.new_zeros(len(masked)).index_add(0, own, losses).unbind()  # a scalar a source
        # Products with numbers, not with a tensor made of them: nothing is copied to the device.
        weights = self.method.token_weights(masked)
        loss = torch.stack([of * (weight * passes) for of, weight in zip(sums, weights, strict=True)]).sum()
        means = [of.detach() * (passes / max(1, n)) for of, n in zip(sums, masked, strict=True)]
        return loss, {"mlm": loss.detach(), **{f"mlm/{k}": mean for k, mean in enumerate(means)}}

    @torch.no_grad()
    def _teacher_hidden(self, inputs: ModelInputs, masked: bool, rows: Tensor | None = None) -> Tensor:
        assert self.teacher is not None, "the method did not say that it needs a teacher"
        ids = inputs.masked_ids if masked else inputs.input_ids
        trunk = self.anatomy.trunk(self.teacher)
        if rows is None:
            return last_hidden_states(trunk, self.anatomy, ids, inputs.key_mask, inputs.packed)
        return last_hidden_states(trunk, self.anatomy, ids[rows], inputs.attention_mask[rows])

    @torch.no_grad()
    def _teacher_logits(self, hidden: Tensor, positions: Tensor) -> Tensor:
        assert self.teacher is not None, "the method did not say that it needs a teacher"
        return self._logits(self.teacher, hidden, positions)

    def masked_sums(self, inputs: ModelInputs) -> Tensor:
        """Of each row, sum of cross-entropies, labels and correct guesses: (B, 3) fp64; masked text."""
        trunk = self.anatomy.trunk(self.lm)
        hidden = last_hidden_states(trunk, self.anatomy, inputs.masked_ids, inputs.key_mask, inputs.packed)
        logits = self._logits(self.lm, hidden, inputs.positions)
        found = (
            cross_entropies(logits, inputs.labels),
            inputs.labels != IGNORED,
            logits.argmax(dim=-1) == inputs.labels,
        )
        of_slots = torch.stack([value.double() for value in found], dim=1)  # (N, 3)
        return of_slots.new_zeros(len(hidden), 3).index_add(0, inputs.rows, of_slots)

    def _logits(self, lm: PreTrainedModel, hidden: Tensor, positions: Tensor) -> Tensor:
        """Logits (N, V) at positions (N,) of hidden states: only those go through the LM head."""
        return self.anatomy.lm_logits(lm, hidden.flatten(0, 1).index_select(0, positions))


@torch.no_grad()
def evaluate_rows(model: TrainingModel, batch: InputTensors) -> Tensor:
    """Score a batch in eval mode.

    Args:
        model: DeepSpeed: ``engine.module``.
        batch: its tensors on the model's device.

    Returns:
        (B, 3) fp64 on that device: of each row the sum of cross-entropies over its labels, their number, and
        the correct guesses.

    """
    training = model.training
    model.eval()
    tensors = batch.input_ids, batch.masked_ids, batch.attention_mask, batch.positions, batch.labels
    sums = model(*tensors, compute=model.masked_sums)
    model.train(training)
    return sums
