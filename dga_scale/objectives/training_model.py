"""The language model with its objective: one module, which is what DeepSpeed trains."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dga_scale.backbone.anatomy import Anatomy
from dga_scale.backbone.gates import Gates
from dga_scale.backbone.packed_rows import last_hidden_states
from dga_scale.corpus.loading.batches import Batch, Counts
from dga_scale.corpus.loading.masking import IGNORED
from dga_scale.errors import UserError
from dga_scale.objectives.cross_entropy import cross_entropies
from dga_scale.objectives.grad_cache import CachedContrast
from dga_scale.objectives.method import LM_VIEW, ForwardOutput, Method
from dga_scale.objectives.views import States, View, run_views
from dga_scale.preservation.protection import Protection


class TrainingModel(nn.Module):
    """A language model that returns its training loss: ``engine(batch, counts)`` under DeepSpeed.

    All that a run computes goes through a call of this module, importance and evaluation too (``compute``),
    so that ZeRO-3, which hooks the call, always has the parameters at hand. Parameters are named ``lm.`` +
    their name in the Hugging Face model.

    Args:
        lm: The language model.
        anatomy: The model's anatomy.
        method: The objective; its kinds of unit can be gated and protected.
        protection: The protection of this model's units, of the method's kinds, which the gates of gated
            views take. None: one of its own, without a soft-mask.
        teacher: A frozen model of the same anatomy, for methods that learn from one; always in eval mode.
        split_views: Whether each view has a forward pass of its own instead of one for all.

    """

    def __init__(
        self,
        lm: PreTrainedModel,
        anatomy: Anatomy,
        method: Method[Any],
        *,
        protection: Protection | None = None,
        teacher: PreTrainedModel | None = None,
        split_views: bool = False,
    ) -> None:
        super().__init__()
        self.lm = lm
        self.anatomy = anatomy
        self.method = method
        self.views, self.contrast = method.views(), method.contrast()
        self.gates = Gates(lm, anatomy, method.kinds)
        self.teacher = teacher
        if teacher is not None:
            teacher.requires_grad_(False).eval()
        self.split_views = split_views
        # No buffers: DeepSpeed would round them to bf16 with the model.
        self.protection = protection or Protection(lm, anatomy=anatomy, kinds=method.kinds, soft_mask="none")

    def train(self, mode: bool = True) -> "TrainingModel":
        """Set the mode as ``nn.Module.train`` does; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block in the backward pass, under its forward pass's gates and dropout draws.

        Raises:
            UserError: Transformers can't recompute the blocks of this architecture (ALBERT, MPNet).
        """
        base: Any = getattr(self.lm, "base", self.lm)  # of an extended model
        if not base.supports_gradient_checkpointing:
            raise UserError(
                f"--gradient_checkpointing true: transformers can't recompute the blocks of "
                f"{base.config.model_type} models. Leave it out"
            )
        options = {"use_reentrant": False, "context_fn": self.gates.checkpoint_contexts}
        with warnings.catch_warnings():
            # The name that replaces it came after transformers 5.20; this one stays until 6.
            warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)
            self.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)

    def forward(
        self,
        inputs: Batch,
        counts: Counts | None = None,
        *,
        cached: CachedContrast | None = None,
        compute: Callable[[Batch], Any] | None = None,
    ) -> Any:
        """Compute the training loss of one micro-batch on this rank.

        Args:
            inputs: The micro-batch, on the model's device.
            counts: The counts of the global batch that it is a part of; only ``compute`` needs none.
            cached: This micro-batch's part of the contrast over all micro-batches of the step; None: the
                contrast is one of this micro-batch on all ranks.
            compute: A function that is run on the inputs and whose result is returned, instead of the loss.

        Returns:
            The loss (scalar, fp32, with gradient), and its terms by name, detached and unweighted: "mlm",
            "mlm/SOURCE" where there are several, and those of the method. A term's mean over the global
            batch's micro-batches is its value on the global batch.

        """
        if compute is not None:
            return compute(inputs)
        assert counts is not None, "a loss is a part of the global batch's: it needs the counts"
        states = self._run_views(inputs, cached)
        logits = self._logits(self.lm, states.hidden[LM_VIEW.name], inputs.positions)
        loss, logged = self._lm_loss(logits, inputs, counts)
        output = ForwardOutput(
            inputs=inputs,
            counts=counts,
            hidden=states.hidden,
            embeddings=states.embeddings,
            trunk=self.anatomy.trunk(self.lm),
            lm_logits=logits,
            teacher=partial(self._teacher_hidden, inputs),
            teacher_logits=self._teacher_logits,
        )
        if self.contrast is not None:
            pooled = self.contrast.pooled(states.hidden, inputs)
            value = self.contrast.loss(pooled) if cached is None else cached.term(pooled)
            loss = loss + self.contrast.weight * value
            logged[self.contrast.name] = value.detach()
        for name, term in self.method.terms(output).items():
            loss = loss + term.weight * term.value
            logged[name] = term.value.detach()
        return loss, logged

    def contrasted(self, inputs: Batch) -> tuple[Tensor, ...]:
        """Return the states (B, H) of the contrast's sides; ``cached`` repeats their dropout draws."""
        assert self.contrast is not None, "the method contrasts no examples"
        return self.contrast.pooled(self._run(self.contrast.views, inputs).hidden, inputs)

    def _run_views(self, inputs: Batch, cached: CachedContrast | None) -> States:
        """Run all views in one forward pass, or the contrasted ones apart to repeat an earlier one."""
        if cached is None or self.contrast is None:
            return self._run(self.views, inputs)
        with cached.repeated_draws():
            states = self._run(self.contrast.views, inputs)
        others = [view for view in self.views if view not in self.contrast.views]
        if others:
            apart = self._run(others, inputs)
            states = States(states.hidden | apart.hidden, states.embeddings | apart.embeddings)
        return states

    def _run(self, views: Sequence[View], inputs: Batch) -> States:
        trunk, a = self.anatomy.trunk(self.lm), self.protection.on(inputs.input_ids.device)
        return run_views(trunk, self.gates, views, inputs, a, split=self.split_views)

    def _lm_loss(self, logits: Tensor, inputs: Batch, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross-entropy of logits (N, V), weighted by source, and the terms that are logged."""
        losses = cross_entropies(logits, inputs.labels)  # (N,)
        labels_per_source, scale = counts.labels_per_source, counts.num_micro_batches
        weights = self.method.token_weights(labels_per_source)
        if len(labels_per_source) == 1:
            loss = losses.sum() * (weights[0] * scale)
            return loss, {"mlm": loss.detach()}
        own = inputs.sources[inputs.label_rows]  # (N,)
        sums = losses.new_zeros(len(weights)).index_add(0, own, losses).unbind()  # a scalar a source
        # Products with numbers, not with a tensor made of them: nothing is copied to the device.
        weighted = [total * (weight * scale) for total, weight in zip(sums, weights, strict=True)]
        loss = torch.stack(weighted).sum()
        counted = zip(sums, labels_per_source, strict=True)
        means = [total.detach() * (scale / max(1, n)) for total, n in counted]
        return loss, {"mlm": loss.detach(), **{f"mlm/{k}": mean for k, mean in enumerate(means)}}

    @torch.no_grad()
    def _teacher_hidden(self, inputs: Batch, masked: bool, rows: Tensor | None = None) -> Tensor:
        assert self.teacher is not None, "the method did not say that it needs a teacher"
        ids = inputs.masked_ids if masked else inputs.input_ids
        trunk = self.anatomy.trunk(self.teacher)
        if rows is None:
            return last_hidden_states(trunk, self.anatomy, ids, inputs.key_mask, inputs.packed_positions)
        return last_hidden_states(trunk, self.anatomy, ids[rows], inputs.attention_mask[rows])

    @torch.no_grad()
    def _teacher_logits(self, hidden: Tensor, positions: Tensor) -> Tensor:
        assert self.teacher is not None, "the method did not say that it needs a teacher"
        return self._logits(self.teacher, hidden, positions)

    def masked_sums(self, inputs: Batch) -> Tensor:
        """Return each row's summed cross-entropies, labels and correct guesses, masked: (B, 3) fp64."""
        trunk = self.anatomy.trunk(self.lm)
        hidden = last_hidden_states(
            trunk, self.anatomy, inputs.masked_ids, inputs.key_mask, inputs.packed_positions
        )
        logits = self._logits(self.lm, hidden, inputs.positions)
        found = (
            cross_entropies(logits, inputs.labels),
            inputs.labels != IGNORED,
            logits.argmax(dim=-1) == inputs.labels,
        )
        of_labels = torch.stack([value.double() for value in found], dim=1)  # (N, 3)
        return of_labels.new_zeros(len(hidden), 3).index_add(0, inputs.label_rows, of_labels)

    def _logits(self, lm: PreTrainedModel, hidden: Tensor, positions: Tensor) -> Tensor:
        """Return the logits (N, V) at positions (N,) of hidden states: only those go through the LM head."""
        return self.anatomy.lm_logits(lm, hidden.flatten(0, 1).index_select(0, positions))


@torch.no_grad()
def evaluate_rows(model: TrainingModel, batch: Batch) -> Tensor:
    """Score a batch in eval mode.

    Args:
        model: The model; of DeepSpeed ``engine.module``.
        batch: The batch, on the model's device.

    Returns:
        (B, 3) fp64 on that device: for each row the sum of cross-entropies over its labels, their number, and
        the number of correct guesses.

    """
    training = model.training
    model.eval()
    sums: Tensor = model(batch, compute=model.masked_sums)
    model.train(training)
    return sums
