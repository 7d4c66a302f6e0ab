"""The language model with its objective: one module, which is what DeepSpeed trains."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dga_scale.backbone.anatomy import Anatomy
from dga_scale.backbone.gates import Gates
from dga_scale.corpus.batches import IGNORED
from dga_scale.objectives.method import LM_VIEW, Method
from dga_scale.objectives.views import ModelInputs, run_views
from dga_scale.preservation.importance import InputTensors


class TrainingModel(nn.Module):
    """A language model that returns its training loss.

    All that a run computes goes through a call of this module, importance and evaluation too (``compute``),
    so that ZeRO-3, which hooks the call, always has the parameters at hand. Parameters are named ``lm.`` +
    their name in the Hugging Face model.

    Args:
        lm: the language model.
        anatomy: its anatomy.
        method: the objective.
        kinds: of unit that can be gated and protected.
        split_views: one pass of the trunk for each view instead of one for all.

    """

    def __init__(
        self,
        lm: PreTrainedModel,
        anatomy: Anatomy,
        method: Method,
        *,
        kinds: Sequence[str] = ("heads",),
        split_views: bool = False,
    ) -> None:
        super().__init__()
        self.lm = lm
        self.anatomy = anatomy
        self.method = method
        self.gates = Gates(lm, anatomy, kinds)
        self.split_views = split_views
        # No buffers: DeepSpeed would round them to bf16 with the model.
        self._protection: dict[str, Tensor] = {}

    def set_protection(self, protection: Mapping[str, Tensor]) -> None:
        """Set ``a`` (layers, units) by kind: the gates of the gated views from here on."""
        self._protection = {kind: a.detach().float() for kind, a in protection.items()}

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
        mlm_scale: float = 1.0,
        compute: Callable[[ModelInputs], Any] | None = None,
    ) -> Any:
        """Training loss of one micro-batch on this rank.

        Args:
            input_ids, masked_ids, attention_mask: (B, T).
            positions, labels: (B, M), labels -100 where there is none.
            mlm_scale: what the sum of cross-entropies is multiplied with. ranks * accumulation / (masked
                tokens of the global batch) makes the mean over ranks and micro-steps, which DeepSpeed takes
                of the gradients, that over all masked tokens of the global batch.
            compute: run this on the inputs and return its result, instead of the loss.

        Returns:
            the loss (scalar, fp32, with gradient), and its terms by name, detached and unweighted: "mlm"
            (scaled) and those of the method. A term's mean over ranks and micro-steps is its value on the
            global batch.

        """
        inputs = ModelInputs(input_ids, masked_ids, attention_mask, positions, labels)
        if compute is not None:
            return compute(inputs)
        device = input_ids.device
        self._protection = {kind: a.to(device) for kind, a in self._protection.items()}  # moves once
        hidden = run_views(
            self.anatomy.trunk(self.lm),
            self.gates,
            self.method.views(),
            inputs,
            self._protection,
            split=self.split_views,
        )
        logits = self._logits(hidden[LM_VIEW.name], positions)
        loss = _cross_entropy_sum(logits, labels) * mlm_scale
        logged = {"mlm": loss.detach()}
        for name, term in self.method.terms(hidden, inputs).items():
            loss = loss + term.weight * term.value
            logged[name] = term.value.detach()
        return loss, logged

    def masked_sums(self, inputs: ModelInputs) -> Tensor:
        """Sum of cross-entropies, number of labels, and correct guesses of the masked text: (3,) fp64."""
        trunk = self.anatomy.trunk(self.lm)
        hidden = trunk(input_ids=inputs.masked_ids, attention_mask=inputs.attention_mask).last_hidden_state
        logits, labels = self._logits(hidden, inputs.positions), inputs.labels.flatten()
        sums = (
            _cross_entropy_sum(logits, inputs.labels),
            (labels != IGNORED).sum(),
            (logits.argmax(dim=-1) == labels).sum(),
        )
        return torch.stack([value.double() for value in sums])

    def _logits(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Logits (B * M, V) at positions (B, M) of hidden states: only those rows go through the LM head."""
        states = hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        return self.anatomy.lm_logits(self.lm, states.flatten(0, 1))


def _cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of cross-entropies in fp32 of logits (N, V) at labels of N entries."""
    return F.cross_entropy(logits.float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def evaluate_sums(model: TrainingModel, batch: InputTensors) -> Tensor:
    """Score a batch in eval mode.

    Args:
        model: DeepSpeed: ``engine.module``.
        batch: its tensors on the model's device.

    Returns:
        (3,) fp64 on that device: sum of cross-entropies over the labels, number of labels, correct guesses.

    """
    training = model.training
    model.eval()
    tensors = batch.input_ids, batch.masked_ids, batch.attention_mask, batch.positions, batch.labels
    sums = model(*tensors, compute=model.masked_sums)
    model.train(training)
    return sums
