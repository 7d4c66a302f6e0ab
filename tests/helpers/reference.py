"""DGA's training step in plain PyTorch: one process, the whole global batch, no DeepSpeed, no dga_scale.

What the distributed runs are compared with. It is written the slow and obvious way on purpose: each view is
a forward of its own, the loss is formed on the full vocabulary logits, a head's rows and columns are found
from the parameter names that transformers gives to BERT and RoBERTa. Use models whose dropout is 0.

    run = Reference(model, protection=a, soft_mask="update", learning_rate=1e-3)
    for batch in global_batches:
        step = run.step(batch, contrast_rows=world_size * micro_batch_size)
    run.weights  # name -> fp32 tensor, to compare with the run's

A trap for whoever compares: the gradient of a key projection's bias is zero in exact arithmetic (softmax
does not see a shift), so with a small eps Adam turns its rounding noise into steps: take eps 1e-2.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GlobalBatch(Protocol):
    """What the reference reads of a batch: all rows of the global batch, in their global order."""

    input_ids: Any  # (B, T)
    masked_ids: Any  # (B, T)
    attention_mask: Any  # (B, T)
    positions: Any  # (N,) in the flattened (B, T)
    labels: Any  # (N,), -100 where there is no label


@dataclass(frozen=True)
class ReferenceStep:
    """The figures of one optimizer step. ``gradients`` are masked (soft_mask="gradient") and not clipped."""

    loss: float
    mlm: float
    contrastive: float
    grad_norm: float
    gradients: dict[str, Tensor]


class Reference:
    """Trains fp32 master weights of ``model`` (its own parameters follow) on whole global batches.

    Args:
        model: BertForMaskedLM or RobertaForMaskedLM with dropout 0; changed in place.
        protection: ``a`` (layers, heads) in [0, 1]: the general view's gates and, as ``1 - a``, the mask.
        soft_mask: "gradient" | "update" | "none".
        contrastive_weight: lambda; 0 leaves the contrast out (plain masked LM).
        shared_view: the contrast's anchors are pooled from the masked text instead of the clean one.
        weight_decay, decays: AdamW's decoupled decay, for the parameters whose name ``decays`` accepts.
        max_grad_norm: None or 0 = no clipping.
        compute_dtype: dtype of forward and backward; the weights that AdamW steps stay fp32.

    """

    def __init__(
        self,
        model: nn.Module,
        *,
        protection: Tensor | None = None,
        soft_mask: str = "none",
        contrastive_weight: float = 1.0,
        shared_view: bool = False,
        temperature: float = 0.05,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        decays: Callable[[str], bool] = lambda name: True,
        max_grad_norm: float | None = None,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        assert soft_mask in ("gradient", "update", "none")
        assert protection is not None or (soft_mask == "none" and contrastive_weight == 0)
        self.weights = {
            name: parameter.detach().clone().float() for name, parameter in model.named_parameters()
        }
        self.model = model.to(compute_dtype).train()
        self.layers = self.model.base_model.encoder.layer
        self.protection = protection
        self.soft_mask = soft_mask
        self.contrastive_weight = contrastive_weight
        self.shared_view = shared_view
        self.temperature = temperature
        self.max_grad_norm = max_grad_norm
        groups = [
            {"params": [w for n, w in self.weights.items() if decays(n)], "weight_decay": weight_decay},
            {"params": [w for n, w in self.weights.items() if not decays(n)], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=learning_rate, betas=betas, eps=eps
        )
        self.factors = (
            {}
            if protection is None
            else {name: mask_of(name, weight, 1 - protection) for name, weight in self.weights.items()}
        )

    def step(
        self, batch: GlobalBatch, *, learning_rate: float | None = None, contrast_rows: int | None = None
    ) -> ReferenceStep:
        """One optimizer step on a global batch.

        ``contrast_rows``: the rows that see one another as negatives (world size * micro batch size when
        gradients are accumulated); default: the whole global batch.
        """
        if learning_rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
        self.model.zero_grad()
        mlm = self.mlm_loss(batch)
        loss, contrastive = mlm, torch.zeros(())
        if self.contrastive_weight:
            contrastive = self.contrastive_loss(batch, contrast_rows or len(batch.input_ids))
            loss = mlm + self.contrastive_weight * contrastive
        loss.backward()

        gradients = {}
        for name, parameter in self.model.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients[name] = gradient.float()
            if self.soft_mask == "gradient":
                gradients[name] = gradients[name] * self.factors[name]
            self.weights[name].grad = gradients[name].clone()
        masters = list(self.weights.values())
        limit = self.max_grad_norm or float("inf")
        grad_norm = float(nn.utils.clip_grad_norm_(masters, limit))

        before = {name: weight.clone() for name, weight in self.weights.items()}
        self.optimizer.step()
        if self.soft_mask == "update":
            for name, weight in self.weights.items():
                weight.copy_(before[name] + self.factors[name] * (weight - before[name]))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.weights[name])
        return ReferenceStep(loss.item(), mlm.item(), contrastive.item(), grad_norm, gradients)

    def mlm_loss(self, batch: GlobalBatch) -> Tensor:
        """Cross-entropy over all masked tokens of the global batch, on the full logits of the stock model."""
        logits = self.model(input_ids=batch.masked_ids, attention_mask=batch.attention_mask).logits
        total, count = torch.zeros(()), 0
        for place, label in zip(batch.positions.tolist(), batch.labels.tolist(), strict=True):
            if label != -100:
                row, position = divmod(place, logits.shape[1])
                total = total - F.log_softmax(logits[row, position].float(), dim=-1)[label]
                count += 1
        return total / count

    def contrastive_loss(self, batch: GlobalBatch, rows: int) -> Tensor:
        """DGA's contrast (eq. of L_contrast) in groups of ``rows`` rows, averaged over the groups."""
        u, v = self.pooled(batch, masked=self.shared_view), self.pooled(batch)
        with self.gated(self.protection):
            w = self.pooled(batch)
        losses = []
        for start in range(0, len(u), rows):
            group = slice(start, start + rows)
            for i in range(start, min(start + rows, len(u))):
                full = F.cosine_similarity(u[i], v[group], dim=-1) / self.temperature
                general = F.cosine_similarity(u[i], w[group], dim=-1) / self.temperature
                losses.append(torch.logsumexp(torch.cat([full, general]), 0) - full[i - start])
        return torch.stack(losses).mean()

    def pooled(self, batch: GlobalBatch, masked: bool = False) -> Tensor:
        """Mean of the last hidden states over real tokens, (B, H) fp32."""
        hidden = self.model.base_model(
            input_ids=batch.masked_ids if masked else batch.input_ids, attention_mask=batch.attention_mask
        ).last_hidden_state.float()
        return torch.stack(
            [h[mask.bool()].mean(0) for h, mask in zip(hidden, batch.attention_mask, strict=True)]
        )

    @contextmanager
    def gated(self, gates: Tensor) -> Iterator[None]:
        """Multiply the output of head h of layer l by ``gates[l, h]`` within the context."""

        def hook(row: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
            def multiply(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                heads = inputs[0].unflatten(-1, (len(row), -1))  # (B, T, heads, head_dim)
                return ((heads * row.to(heads.dtype)[:, None]).flatten(-2), *inputs[1:])

            return multiply

        handles = [
            layer.attention.output.dense.register_forward_pre_hook(hook(row))
            for layer, row in zip(self.layers, gates, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def mask_of(name: str, weight: Tensor, scale: Tensor) -> Tensor:
    """Return the soft-mask of one parameter, in the shape of ``weight``.

    ``scale`` (layers, heads) stands on the rows of Q, K, V and on the columns of the attention output
    projection, 1 everywhere else.
    """
    mask = torch.ones_like(weight)
    found = re.search(
        r"encoder\.layer\.(\d+)\.attention\.(self\.(?:query|key|value)|output\.dense)\.(\w+)$", name
    )
    if found is None:
        return mask
    layer, module, leaf = int(found[1]), found[2], found[3]
    heads = scale.shape[1]
    for head in range(heads):
        if module != "output.dense":
            width = weight.shape[0] // heads
            mask[head * width : (head + 1) * width] = scale[layer, head]
        elif leaf == "weight":
            width = weight.shape[1] // heads
            mask[:, head * width : (head + 1) * width] = scale[layer, head]
    return mask


def per_example_fisher(lm: nn.Module, batch: GlobalBatch) -> dict[str, Tensor]:
    """Mean over examples of the squared gradient of each one's own masked-LM loss, unpadded; eval mode."""
    lm.eval()
    squares = {name: torch.zeros_like(p) for name, p in lm.named_parameters()}
    for row, length in enumerate(batch.attention_mask.sum(dim=1).tolist()):
        lm.zero_grad()
        own = (batch.positions // batch.masked_ids.shape[1] == row) & (batch.labels != -100)
        labels, positions = batch.labels[own], batch.positions[own] % batch.masked_ids.shape[1]
        logits = lm(input_ids=batch.masked_ids[row : row + 1, :length]).logits[0, positions]
        F.cross_entropy(logits, labels).backward()
        for name, parameter in lm.named_parameters():
            if parameter.grad is not None:
                squares[name] += parameter.grad**2 / len(batch.masked_ids)
    return squares
