"""A tiny BERT and batches for it, the same on every rank from their seeds."""

from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.corpus.loading.batches import Batch
from dga_scale.corpus.loading.masking import IGNORED
from dga_scale.objectives.methods import METHODS
from dga_scale.objectives.training_model import TrainingModel
from tests.helpers.batches import batch_of

VOCAB, LAYERS, HEADS, HIDDEN, INTERMEDIATE = 96, 2, 4, 32, 48
PAD, MASK = 1, 3


def toy_lm(dropout: float = 0.0, seed: int = 0) -> BertForMaskedLM:
    """A random BERT whose weights are large enough that its heads differ; in train mode."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INTERMEDIATE,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.15,
        pad_token_id=PAD,
    )
    return BertForMaskedLM(config).train()


def toy_model(
    method: str = "dga",
    dropout: float = 0.0,
    seed: int = 0,
    *,
    split_views: bool = False,
    **settings: Any,
) -> TrainingModel:
    """The training model of ``toy_lm``, without protection yet; ``settings`` of the method."""
    lm = toy_lm(dropout, seed)
    objective = METHODS[method](METHODS[method].Settings(**settings))
    return TrainingModel(lm, anatomy_of(lm), objective, split_views=split_views).train()


def toy_protection(seed: int = 0) -> Tensor:
    """``a`` (layers, heads) in [0, 1), with a 0 and a value near 1 in each layer."""
    a = torch.rand(LAYERS, HEADS, generator=torch.Generator().manual_seed(seed))
    a[:, 0], a[:, 1] = 0.0, 0.95
    return a


def toy_batch(rows: int = 8, tokens: int = 12, seed: int = 0) -> Batch:
    """Rows of 6 to ``tokens`` tokens with 1 to 3 masked positions each: both differ from row to row."""
    generator = torch.Generator().manual_seed(1000 + seed)
    ids = torch.randint(5, VOCAB, (rows, tokens), generator=generator)
    lengths = torch.randint(6, tokens + 1, (rows,), generator=generator)
    attention_mask = (torch.arange(tokens) < lengths[:, None]).long()
    ids = ids.masked_fill(attention_mask == 0, PAD)
    masked_ids = ids.clone()
    labels = torch.full_like(ids, IGNORED)
    for row in range(rows):
        count = int(torch.randint(1, 4, (), generator=generator))
        chosen = torch.randperm(int(lengths[row]), generator=generator)[:count].sort().values
        labels[row, chosen], masked_ids[row, chosen] = ids[row, chosen], MASK
    return batch_of(ids, masked_ids, attention_mask, labels)
