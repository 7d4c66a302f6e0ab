"""Small models behind soft prompts that are the embeddings of words."""

import torch

from dga_scale.backbone.extended import ExtendedPreTrainedModel, extend
from tests.helpers.tiny_models import TINY, VOCAB

TOKENS = 3
WORDS = torch.arange(VOCAB - TOKENS, VOCAB)


def with_prompt(name: str) -> ExtendedPreTrainedModel:
    """Its soft tokens are the embeddings of ``WORDS``."""
    torch.manual_seed(0)
    model = extend(TINY[name].model(), "prompt", {"tokens": TOKENS})
    with torch.no_grad():
        model.base_model.soft_prompt.weight.copy_(model.get_input_embeddings()(WORDS))
    return model
