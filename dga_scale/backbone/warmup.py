"""Head warm-up: an encoder saved without its LM head (a sentence encoder, say) becomes a masked LM."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from dga_scale.backbone.anatomy import Anatomy
from dga_scale.backbone.packed_rows import last_hidden_states
from dga_scale.corpus.loading.batches import Batch
from dga_scale.errors import UserError
from dga_scale.storage.checked_tensors import load_tensors, save_tensors


def warm_up_head(
    model: PreTrainedModel,
    anatomy: Anatomy,
    batches: Iterable[Batch],
    *,
    steps: int,
    learning_rate: float,
    train_trunk: bool = False,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    autocast: torch.dtype | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> None:
    """Train the LM head's own parameters on the predicted positions.

    AdamW (weight decay 0), learning rate falling linearly to 0 after the last step, dropout off. A decoder
    tied to the embeddings stays tied and, like them, as it was.

    Args:
        model: The model, whole on every rank, with the same weights on all.
        anatomy: The model's anatomy.
        batches: At least ``steps`` of them, on the model's device; this rank's part of each global batch.
        steps: The number of optimizer steps.
        learning_rate: The learning rate at the first step.
        train_trunk: Whether all parameters are trained instead, the embeddings too.
        reduce: The function that sums a tensor over the ranks; by default that of one process. Every rank
            then takes the same step, that of one process with the whole global batch.
        autocast: The dtype of the matrix products, bfloat16 for one; None: that of the parameters.
        on_step: The function that gets each finished step's number from 0 and its loss (a scalar over the
            global batch).

    """
    own = set(anatomy.lm_head_parameters)
    parameters = [p for name, p in model.named_parameters() if train_trunk or name in own]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, eps=1e-6, weight_decay=0.0)
    was_training = model.training
    model.eval()
    for step, batch in zip(range(steps), batches, strict=False):
        with torch.autocast(batch.labels.device.type, autocast, enabled=autocast is not None):
            with torch.set_grad_enabled(train_trunk):
                hidden = last_hidden_states(
                    anatomy.trunk(model),
                    anatomy,
                    batch.masked_ids,
                    batch.attention_mask,
                    batch.packed_positions,
                )  # (B, T, H)
            states = hidden.flatten(0, 1).index_select(0, batch.positions)
            logits = anatomy.lm_logits(model, states)  # (N, vocab)
        total = F.cross_entropy(logits.float(), batch.labels, reduction="sum")  # ignores -100
        gradients = torch.autograd.grad(total, parameters)
        # One message for the loss, the number of labels and all gradients.
        count = (batch.labels >= 0).sum()
        sums = reduce(torch.cat([g.flatten() for g in (total.detach(), count, *gradients)]))
        loss = sums[0] / sums[1]
        parts = (sums[2:] / sums[1]).split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        optimizer.step()
        if on_step is not None:
            on_step(step, loss)
    optimizer.zero_grad()
    model.train(was_training)


def save_head(model: PreTrainedModel, anatomy: Anatomy, path: Path, base_model: str = "") -> None:
    """Save the LM head's own parameters, or nothing: a run that starts again starts from the same model.

    Args:
        model: The model with its head.
        anatomy: The model's anatomy.
        path: The file to be written.
        base_model: The hash of the weights that the head was trained on.

    """
    own = set(anatomy.lm_head_parameters)
    metadata = {"format": "pt", "base_model": base_model}
    save_tensors({n: p for n, p in model.named_parameters() if n in own}, path, metadata)


def head_is_of(path: Path, base_model: str) -> bool:
    """Return whether ``path`` is a whole file of a head that was trained on weights of this hash."""
    try:
        _, metadata = load_tensors(path)
    except (OSError, SafetensorError, ValueError):
        return False
    return metadata.get("base_model") == base_model


@torch.no_grad()
def load_head(model: PreTrainedModel, anatomy: Anatomy, path: Path) -> None:
    """Load the parameters that ``save_head`` wrote into the model.

    Raises:
        UserError: A file that can't be read, is damaged, or is of another model.

    """
    try:
        tensors, _ = load_tensors(path)
        for name in anatomy.lm_head_parameters:
            model.get_parameter(name).copy_(tensors[name])
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{path}, the LM head that this run trained, can't be read ({type(error).__name__}: {error}); "
            "restore it, or start anew in another --output_dir"
        ) from None
