"""Gradient consistency: which text shares the gradient direction of most text, and which is the long tail.

CSE (Dong et al., NeurIPS 2024): J holds the gradients of one block's parameters, a row a sequence, and
``g(X) = u_max^T J`` with u_max the top eigenvector of ``J J^T`` (its entries' sum >= 0) is the direction that
the sequences X share. ``GC(X') = cos(g(X), g(X'))``: near 1 for text that the block learns along with the
rest, near 0 or below for text that it does not.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from dga_scale.backbone.anatomy import Anatomy
from dga_scale.backbone.loading import LoadedModel
from dga_scale.corpus.loading.batches import Batch
from dga_scale.corpus.loading.masking import IGNORED, MaskingPolicy
from dga_scale.corpus.loading.streams import EvalBatches
from dga_scale.corpus.shards import Corpus
from dga_scale.errors import UserError
from dga_scale.experts.sublayers import block_of

_COLUMNS = 1 << 20
"""The number of columns of J that are in fp64 at a time."""


@dataclass(frozen=True)
class Consistency:
    """The consistency of one group of sequences X' with all sequences X.

    Attributes:
        rows: The GC of each sequence alone, (n,): the cosine of its gradient and g(X).
        group: The GC of the group, cos(g(X), g(X')).
    """

    rows: Tensor
    group: float

    def as_dict(self) -> dict[str, Any]:
        """Return the content of the JSON file."""
        return {
            "sequences": len(self.rows),
            "group": self.group,
            "mean": self.rows.mean().item(),
            "median": self.rows.median().item(),
            "share_below_0": (self.rows < 0).double().mean().item(),
            "rows": self.rows.tolist(),
        }


def shared_direction(gradients: Tensor) -> Tensor:
    """Compute g = u_max^T J of gradients J (n, parameters): (parameters,) in fp64."""
    products = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for columns in gradients.split(_COLUMNS, dim=1):
        products += columns.double() @ columns.double().T
    _, vectors = torch.linalg.eigh(products)  # ascending
    top = vectors[:, -1]
    top = top if top.sum() >= 0 else -top
    return torch.cat([top @ columns.double() for columns in gradients.split(_COLUMNS, dim=1)])


def consistency(groups: Mapping[str, Tensor]) -> dict[str, Consistency]:
    """Compare each group with all groups together.

    Args:
        groups: The gradients (n, parameters) of the sequences of each group, by its name.
    """
    everything = shared_direction(torch.cat(list(groups.values())))
    return {
        name: Consistency(
            rows=torch.stack([F.cosine_similarity(row.double(), everything, dim=0) for row in gradients]),
            group=F.cosine_similarity(shared_direction(gradients), everything, dim=0).item(),
        )
        for name, gradients in groups.items()
    }


def corpus_gradients(
    loaded: LoadedModel, corpus: Corpus, layer: int, rows: int, mlm_probability: float
) -> Tensor:
    """Compute the gradients of the LM loss of a fixed sample of a corpus: (rows, parameters of the block).

    Raises:
        UserError: As ``block_parameters`` and ``sequence_gradients``; or the corpus is empty, or its
            tokenizer has no mask token.
    """
    lm, anatomy, device = loaded.model, loaded.anatomy, loaded.model.device
    masking = None if anatomy.causal else MaskingPolicy.for_corpus(corpus, mlm_probability)
    batches = EvalBatches(corpus, masking, batch_size=1, rank=0, world_size=1, max_rows=rows)

    def losses() -> Iterator[Callable[[], Tensor]]:
        for batch in batches:

            def loss(batch: Batch = batch) -> Tensor:
                ids, mask = batch.masked_ids.to(device), batch.attention_mask.to(device)
                hidden = anatomy.trunk(lm)(input_ids=ids, attention_mask=mask).last_hidden_state
                logits = anatomy.lm_logits(lm, hidden[0, batch.positions.to(device)])
                return F.cross_entropy(logits.float(), batch.labels.to(device), ignore_index=IGNORED)

            yield loss

    return sequence_gradients(lm, block_parameters(lm, anatomy, layer), losses(), len(batches))


def block_parameters(lm: PreTrainedModel, anatomy: Anatomy, layer: int) -> list[torch.nn.Parameter]:
    """List the parameters of one block.

    Raises:
        UserError: The model has no such layer.

    """
    if not 0 <= layer < anatomy.num_layers:
        raise UserError(f"--layer {layer}: the model's layers are 0 to {anatomy.num_layers - 1}")
    return list(lm.get_submodule(block_of(anatomy, layer).removesuffix(".")).parameters())


def sequence_gradients(
    lm: PreTrainedModel,
    parameters: Sequence[torch.nn.Parameter],
    losses: Iterable[Callable[[], Tensor]],
    count: int,
) -> Tensor:
    """Compute the gradient of each sequence's loss, without dropout: (count, parameters), fp32, on the CPU.

    Args:
        lm: The model.
        parameters: The parameters of one block.
        losses: A function for each sequence that returns its loss; ``count`` of them.
        count: The number of sequences.

    Raises:
        UserError: The gradients don't fit into memory.
    """
    width = sum(parameter.numel() for parameter in parameters)
    needed, free = 3 * 4 * count * width, psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"gradients of {count} sequences for {width:,} parameters need {needed / 2**30:.1f} GiB of "
            f"memory, and {free / 2**30:.1f} GiB are free: lower --rows to {max(1, count * free // needed)}"
        )
    training = lm.training
    lm.eval()
    gradients = torch.empty(count, width)
    for row, loss in enumerate(losses):
        found = torch.autograd.grad(loss(), parameters, allow_unused=True)
        flat = [
            torch.zeros(parameter.numel()) if gradient is None else gradient.detach().float().cpu().flatten()
            for gradient, parameter in zip(found, parameters, strict=True)
        ]
        gradients[row] = torch.cat(flat)
    lm.train(training)
    return gradients
