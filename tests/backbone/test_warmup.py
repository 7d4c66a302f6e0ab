"""Head warm-up, against plain PyTorch on the stock model and on several real ranks."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.backbone.warmup import warm_up_head
from dga_scale.corpus.loading.batches import Batch
from tests.helpers.batches import batch_of, dense_labels, rows_of
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_models import TINY, VOCAB


def batches(number: int, rows: int = 4) -> Iterator[Batch]:
    """Token i is always followed by i + 1: something a head can learn. Uneven numbers of labels a row."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(number):
        start = torch.randint(5, VOCAB - 20, (rows, 1), generator=generator)
        ids = start + torch.arange(12)
        positions = torch.rand(rows, 12, generator=generator).topk(3, dim=1).indices.sort(dim=1).values
        labels = ids.gather(1, positions)
        labels[::2, 2] = -100
        dense = torch.full_like(ids, -100).scatter(1, positions, labels)
        yield batch_of(ids, ids.scatter(1, positions, 4), torch.ones_like(ids), dense)


def full_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The stock model's own masked-LM loss, over full logits."""
    logits = model(input_ids=batch.masked_ids, attention_mask=batch.attention_mask).logits
    return F.cross_entropy(logits.flatten(0, 1), dense_labels(batch).flatten())


def plain_pytorch(model: PreTrainedModel, names: list[str], steps: int, learning_rate: float) -> list[float]:
    """The same by hand: freeze the others, backward on the full loss, AdamW with torch's own scheduler."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=learning_rate, eps=1e-6, weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    losses = []
    for batch in batches(steps):
        optimizer.zero_grad()
        loss = full_loss(model, batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["bert", "xlm-roberta", "electra", "modernbert", "distilbert", "llama"])
@pytest.mark.parametrize("train_trunk", [False, True])
def test_warm_up_takes_the_steps_of_plain_pytorch(name: str, train_trunk: bool) -> None:
    torch.manual_seed(1)
    model = TINY[name].model()
    anatomy = anatomy_of(model)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    reference = TINY[name].model()
    reference.load_state_dict(model.state_dict())
    losses: list[float] = []
    model.train()  # dropout of 0.1 in most of them: warm-up must switch it off
    warm_up_head(
        model,
        anatomy,
        batches(6),
        steps=5,
        learning_rate=1e-2,
        train_trunk=train_trunk,
        on_step=lambda step, loss: losses.append(loss.item()),
    )
    names = list(before) if train_trunk else list(anatomy.lm_head_parameters)
    expected = plain_pytorch(reference, names, 5, 1e-2)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    for key, parameter in reference.named_parameters():
        own = dict(model.named_parameters())[key]
        if key in names and not key.endswith(
            "bias"
        ):  # a key bias has but rounding noise, which Adam inflates
            torch.testing.assert_close(own, parameter, rtol=1e-3, atol=1e-4)
            assert not torch.equal(own, before[key])
        if key not in names:
            assert torch.equal(own, before[key])
    decoder = model.get_output_embeddings()
    if model.config.tie_word_embeddings:
        assert decoder.weight is model.get_input_embeddings().weight


def test_a_new_head_learns_and_the_model_is_left_as_it_came() -> None:
    model = TINY["bert"].model(hidden_dropout_prob=0.5).train()
    held_out = next(batches(1, rows=64))
    before = full_loss(model.eval(), held_out).item()
    model.train()
    warm_up_head(model, anatomy_of(model), batches(60), steps=60, learning_rate=3e-2)
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert full_loss(model.eval(), held_out).item() < 0.8 * before


def test_bf16_products_lead_nearly_the_same_way() -> None:
    losses: dict[torch.dtype | None, list[float]] = {None: [], torch.bfloat16: []}
    for dtype, seen in losses.items():
        torch.manual_seed(0)
        model = TINY["bert"].model()
        warm_up_head(
            model,
            anatomy_of(model),
            batches(5),
            steps=5,
            learning_rate=1e-2,
            autocast=dtype,
            on_step=lambda step, loss, seen=seen: seen.append(loss.item()),
        )
        assert model.dtype == torch.float32
    assert losses[None] != losses[torch.bfloat16]
    torch.testing.assert_close(losses[None], losses[torch.bfloat16], rtol=0.02, atol=0.0)


def warmed_up(rank: int | None = None, world_size: int = 1) -> tuple[dict[str, Tensor], list[float]]:
    """Warm up on this rank's rows of each global batch of 4; rank 0 of 2 has 3 of them."""
    torch.manual_seed(0)
    model = TINY["bert"].model()

    own = {0: slice(0, 3), 1: slice(3, 4), None: slice(None)}[rank]

    def total(tensor: Tensor) -> Tensor:
        if rank is not None:
            dist.all_reduce(tensor)
        return tensor

    losses: list[float] = []
    warm_up_head(
        model,
        anatomy_of(model),
        (rows_of(batch, own) for batch in batches(5)),
        steps=5,
        learning_rate=1e-2,
        reduce=total,
        on_step=lambda step, loss: losses.append(loss.item()),
    )
    return {key: value.detach() for key, value in model.named_parameters()}, losses


def on_a_rank() -> tuple[dict[str, Tensor], list[float]]:
    return warmed_up(dist.get_rank(), dist.get_world_size())


def test_ranks_with_unlike_numbers_of_labels_stay_equal_and_match_one_process() -> None:
    weights, losses = warmed_up()
    (first, first_losses), (second, second_losses) = run_ranks(2, on_a_rank)
    assert first_losses == second_losses
    torch.testing.assert_close(first_losses, losses, rtol=1e-5, atol=1e-6)
    for key, value in weights.items():
        assert torch.equal(first[key], second[key])
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-5)
