"""Soft prompts (Lester et al., arXiv 2104.08691) as an extension of any architecture.

Written here because ``peft``'s prompt tuning knows no masked LM, and needs ``peft`` to load what it trained.
"""

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from dga_scale.backbone.anatomy import Anatomy, trunk_of
from dga_scale.backbone.extended import Settings, keep_no_cache, register_extension
from dga_scale.errors import UserError

PROMPT = "soft_prompt"
"""Name of the soft tokens inside the trunk."""


class SoftPrompt(nn.Module):
    """Embeddings of tokens that no vocabulary has.

    Args:
        tokens: P, their number.
        width: The width of the embeddings.
        std: The standard deviation of their first, random values.
        dtype: The dtype of the weights.

    """

    def __init__(self, tokens: int, width: int, std: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tokens, width, dtype=dtype))
        nn.init.normal_(self.weight, std=std)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Put the soft tokens before embeddings (B, T, H): (B, P + T, H)."""
        rows = self.weight.to(embeddings.dtype).expand(len(embeddings), -1, -1)
        return torch.cat([rows, embeddings], dim=1)


def apply(base: PreTrainedModel, anatomy: Anatomy, settings: Settings) -> Anatomy:
    """Put soft tokens before every text that the trunk of ``base`` gets.

    They take the first positions and are attended to by all tokens. The trunk's output has the states of the
    text alone, so heads, losses and poolings are none the wiser; a pooler reads the text's first token.

    Args:
        base: The base model, which is changed.
        anatomy: The anatomy of ``base``.
        settings: ``tokens``, their number P.

    Returns:
        The anatomy, with P positions fewer.

    Raises:
        UserError: The model has no more than P positions.

    """
    tokens = settings["tokens"]
    if tokens >= anatomy.max_positions:
        raise UserError(
            f"{tokens} soft tokens leave no room for text: the model has {anatomy.max_positions} positions. "
            "Set --prompt_tokens to fewer"
        )
    trunk: Any = trunk_of(base)
    width = trunk.get_input_embeddings().embedding_dim
    trunk.add_module(PROMPT, SoftPrompt(tokens, width, embedding_std(base), base.dtype))
    keep_no_cache(base, "a soft prompt")
    trunk.register_forward_pre_hook(_put_before, with_kwargs=True)
    trunk.register_forward_hook(_take_off)
    return dataclasses.replace(anatomy, max_positions=anatomy.max_positions - tokens, first_position=None)


def embedding_std(model: PreTrainedModel) -> float:
    """Return the standard deviation of a new word's embedding as blocks read it: Gemma scales its own."""
    scale = getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0)
    return float(getattr(model.config, "initializer_range", 0.02) * scale)


def _put_before(
    trunk: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    given = dict(zip(inspect.signature(trunk.forward).parameters, args, strict=False)) | kwargs
    ids, embeddings = given.pop("input_ids", None), given.get("inputs_embeds")
    if embeddings is None:
        embeddings = trunk.get_input_embeddings()(ids)
    mask = given.get("attention_mask")
    if mask is None:
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
    prompt = trunk.get_submodule(PROMPT)
    tokens = prompt_length(trunk)
    given["inputs_embeds"] = prompt(embeddings)
    given["attention_mask"] = torch.cat([mask.new_ones(len(mask), tokens), mask], dim=1)
    if given.get("token_type_ids") is not None:
        types = given["token_type_ids"]
        given["token_type_ids"] = torch.cat([types.new_zeros(len(types), tokens), types], dim=1)
    if given.get("position_ids") is not None:
        positions = given["position_ids"]
        first = torch.arange(tokens, device=positions.device).expand(len(positions), -1)
        given["position_ids"] = torch.cat([first, positions + tokens], dim=1)
    return (), given


def prompt_length(trunk: nn.Module) -> int:
    """Return the number of soft tokens, also where ZeRO-3 has partitioned them."""
    weight: Any = trunk.get_submodule(PROMPT).weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def _take_off(trunk: Any, args: tuple[Any, ...], output: ModelOutput) -> ModelOutput:
    tokens = prompt_length(trunk)
    output["last_hidden_state"] = output["last_hidden_state"][:, tokens:]
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(states[:, tokens:] for states in output["hidden_states"])
    if output.get("pooler_output") is not None:
        output["pooler_output"] = trunk.pooler(output["last_hidden_state"])
    return output


register_extension("prompt", apply)
