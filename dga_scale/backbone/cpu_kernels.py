"""Dropout and attention that cost little on a CPU, instead of torch's.

There, torch draws a double for each entry that may be dropped, which is a fifth of a masked LM's step, and
``scaled_dot_product_attention`` has two ways, both slow in training: with dropout it computes in float32
whatever the dtype, without it its bf16 backward pass takes seven times as long as plain products.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "dga_scale_cpu"
"""Name of ``attention`` among transformers' implementations."""

_DRAWS = 2**16
"""Values of a draw: four of them are cut from each 64-bit word."""

_SHORT = 512
"""Longest sequence whose plain bf16 products take less than torch's flash attention, backward included."""

_UNUSUAL = ("position_bias", "cache", "softcap")
"""Arguments of an attention that are left to transformers' own."""


def use_cpu_kernels(model: nn.Module) -> None:
    """Give a model that trains on a CPU the dropout and the attention of this file.

    Names, parameters, config as saved and eval mode stay as they are; so does an attention other than
    ``sdpa``. Can be called again, after a method has added modules.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p, child.inplace).train(child.training))
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig) and config._attn_implementation == "sdpa":
            config._attn_implementation = ATTENTION


class Dropout(nn.Dropout):
    """``nn.Dropout`` with draws of 16 bits: each probability is rounded to a multiple of 1/65536."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop in train mode; shapes as in ``nn.Dropout``."""
        if not self.training or self.p in (0, 1) or input.device.type != "cpu":
            return super().forward(input)
        keep, scale = _kept(input.shape, self.p)
        return (input * keep).mul_(scale)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' ``sdpa`` does, in plain products and the dtype of the query where that pays.

    Args:
        module: The layer that attends.
        query: (batch, heads, tokens, head width).
        key, value: (batch, heads or groups of them, tokens, head width).
        attention_mask: The mask, as ``sdpa_mask`` makes it: bool, true where a query (batch or 1, 1, query
            tokens, key tokens) sees a key; or a float to be added to the scores; None: all, or the past only
            where the layer is causal.
        dropout: The probability with which a weight is dropped.
        scaling: The factor of the scores; None: one over the root of the head's width.
        is_causal: None: what the layer says.
        kwargs: Arguments that other implementations read.

    Returns:
        (batch, tokens, heads, head width), and no weights.

    """
    unusual = any(kwargs.get(name) is not None for name in _UNUSUAL)
    # In train mode whatever the grad mode: GradCache repeats a pass without gradients with them, to the bit.
    differentiated = module.training or torch.is_grad_enabled()
    pays = dropout > 0 or (differentiated and query.dtype == torch.bfloat16 and key.shape[2] <= _SHORT)
    if unusual or not pays or query.device.type != "cpu":
        return sdpa_attention_forward(
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs,
        )  # fmt: skip
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = (query * (scaling or query.shape[-1] ** -0.5)) @ key.transpose(-1, -2)
    if attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        attention_mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attention_mask is not None:
        scores += _bias(attention_mask, scores.dtype)
    weights = scores.softmax(dim=-1)
    if dropout > 0:
        keep, scale = _kept(weights.shape, dropout)
        # Values are fewer than weights: they take the scale.
        weights, value = weights * keep, value * scale
    return (weights @ value).transpose(1, 2).contiguous(), None


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scores' bias where the mask is bool; a query that sees nothing sees all, and no NaN."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def _kept(shape: torch.Size, probability: float) -> tuple[Tensor, float]:
    """Draw the entries that are kept (1, or 0 with ``probability``; int8), and 1 over the chance of that.

    Torch's generator seeds the draws, so they repeat where its state does.
    """
    dropped = min(round(probability * _DRAWS), _DRAWS - 1)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    words = np.random.SFC64(seed).random_raw(-(-shape.numel() // 4))
    draws = torch.from_numpy(words).view(torch.int16)[: shape.numel()].view(shape)
    keep = torch.empty(shape, dtype=torch.int8)
    torch.ge(draws, dropped - _DRAWS // 2, out=keep)
    return keep, _DRAWS / (_DRAWS - dropped)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
