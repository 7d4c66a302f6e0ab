"""Movement of heads since the start, and what it says of their protection."""

import pytest
import torch
from torch import Tensor

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.corpus.loading.batches import Counts
from dga_scale.preservation.movement import MovementTracker, compare
from dga_scale.preservation.soft_mask import GradientMask, UpdateMask, mask_factors
from tests.helpers.tiny_models import TINY
from tests.helpers.toy import LAYERS, toy_batch, toy_model, toy_protection
from tests.preservation.test_soft_mask import cut


@pytest.mark.parametrize("pieces", [1, 5])
def test_movement_is_the_distance_of_the_query_rows_from_the_start(pieces: int) -> None:
    """BERT has weight and bias of separate projections: head h has rows 8h to 8h + 8 of both."""
    lm = TINY["bert"].model()
    anatomy = anatomy_of(lm)
    weights = {name: parameter.detach() for name, parameter in lm.named_parameters()}
    start = {name: weight.clone() for name, weight in weights.items()}
    generator = torch.Generator().manual_seed(0)
    fragments = cut(weights, pieces, generator)
    tracker = MovementTracker(anatomy, fragments)
    for weight in weights.values():
        weight += torch.randn(weight.shape, generator=generator)

    moved = tracker.movement(fragments, lambda tensor: tensor)["heads"]
    for layer in range(anatomy.num_layers):
        for head in range(anatomy.num_heads):
            rows = slice(8 * head, 8 * head + 8)
            squares = []
            for leaf in ("weight", "bias"):
                name = f"bert.encoder.layer.{layer}.attention.self.query.{leaf}"
                squares.append((weights[name][rows] - start[name][rows]).square().flatten())
            assert moved[layer, head].item() == pytest.approx(
                torch.cat(squares).mean().sqrt().item(), rel=1e-5
            )


def test_movement_reads_the_query_columns_of_a_fused_projection() -> None:
    """GPT-2: only the first third of c_attn's columns are queries."""
    lm = TINY["gpt2"].model()
    weights = {name: parameter.detach() for name, parameter in lm.named_parameters()}
    fragments = cut(weights, 3, torch.Generator().manual_seed(0))
    tracker = MovementTracker(anatomy_of(lm), fragments)
    weights["transformer.h.1.attn.c_attn.weight"][:, 32:] += 1  # keys and values
    assert not tracker.movement(fragments, lambda tensor: tensor)["heads"].any()
    weights["transformer.h.1.attn.c_attn.weight"][:, 8:16] += 2  # queries of head 1
    weights["transformer.h.1.attn.c_attn.bias"][8:16] += 2
    moved = tracker.movement(fragments, lambda tensor: tensor)["heads"]
    expected = torch.zeros(2, 4)
    expected[1, 1] = 2
    torch.testing.assert_close(moved, expected)


def test_shards_of_several_ranks_add_up() -> None:
    """Each rank's tracker holds its own fragments; ``reduce`` sums what they see."""
    lm = TINY["bert"].model()
    anatomy = anatomy_of(lm)
    weights = {name: parameter.detach() for name, parameter in lm.named_parameters()}
    fragments = cut(weights, 4, torch.Generator().manual_seed(0))
    ranks = [fragments[0::2], fragments[1::2]]
    whole = MovementTracker(anatomy, fragments)
    trackers = [MovementTracker(anatomy, own) for own in ranks]
    for weight in weights.values():
        weight += torch.randn_like(weight)
    local: list[Tensor] = []

    def remember(tensor: Tensor) -> Tensor:
        local.append(tensor)
        return tensor

    for tracker, own in zip(trackers, ranks, strict=True):
        tracker.movement(own, remember)
    squares, entries = local[0] + local[2], local[1] + local[3]
    expected = whole.movement(fragments, lambda tensor: tensor)["heads"]
    torch.testing.assert_close((squares / entries).sqrt().view(2, 4), expected)


def test_ranks_that_all_hold_everything_see_the_movement_of_one() -> None:
    """ZeRO-0: every rank's fragments are the whole model, and ``reduce`` counts them all."""
    lm = TINY["bert"].model()
    weights = {name: parameter.detach() for name, parameter in lm.named_parameters()}
    fragments = cut(weights, 1, torch.Generator())
    tracker = MovementTracker(anatomy_of(lm), fragments)
    for weight in weights.values():
        weight += torch.randn_like(weight)
    alone = tracker.movement(fragments, lambda tensor: tensor)["heads"]
    torch.testing.assert_close(tracker.movement(fragments, lambda tensor: 4 * tensor)["heads"], alone)


def test_relative_movement_is_against_the_least_protected_of_the_layer() -> None:
    a = torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.2, 0.4, 0.6, 0.8]])
    moved = torch.tensor([[1.0, 3.0, 1.0, 0.0], [4.0, 3.0, 2.0, 1.0]])
    result = compare(moved, a)
    torch.testing.assert_close(result.relative, torch.tensor([[0.5, 1.5, 0.5, 0.0], [1.0, 0.75, 0.5, 0.25]]))
    torch.testing.assert_close(result.target, 1 - a)
    # Above one half are 1.0 in the first layer, 0.6 and 0.8 in the second.
    asked, measured = (1.0 + 0.6 + 0.8) / 3, 1 - (0.0 + 0.5 + 0.25) / 3
    assert result.figures() == pytest.approx(
        {"protected_units": 3, "target_protection": asked, "measured_protection": measured}
    )
    assert compare(moved, a / 2).figures() == {}
    assert not compare(torch.zeros(2, 4), a).relative.any()  # nothing has moved yet: no NaN in the log


@pytest.mark.parametrize("soft_mask", ["gradient", "update"])
def test_adam_undoes_a_gradient_mask_and_not_an_update_mask(soft_mask: str) -> None:
    """The finding that docs/methods.md tabulates: 1 - a = 0.05 leaves most of the movement, or 5% of it."""
    model = toy_model("mlm")
    a = torch.zeros_like(toy_protection())
    a[:, 1] = 0.95
    factors = mask_factors(model.anatomy, {"heads": a})
    weights = {name: parameter.detach() for name, parameter in model.lm.named_parameters()}
    fragments = cut(weights, 1, torch.Generator())
    tracker = MovementTracker(model.anatomy, fragments)
    gradient_mask = GradientMask(model.lm.named_parameters(), model.anatomy)
    update_mask = UpdateMask(model.anatomy, factors if soft_mask == "update" else {})
    if soft_mask == "gradient":
        gradient_mask.set(factors)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, eps=1e-6, weight_decay=0)
    for step in range(30):
        optimizer.zero_grad()
        loss, _ = model(toy_batch(8, seed=step), Counts((16,), 1))
        loss.backward()
        update_mask.before_step(fragments)
        optimizer.step()
        update_mask.after_step(fragments)
    effective = tracker.effective_protection(fragments, {"heads": a}, lambda tensor: tensor)["heads"]
    protected = effective.relative[:, 1]
    assert effective.target[:, 1].tolist() == pytest.approx([0.05] * LAYERS)
    if soft_mask == "gradient":
        assert bool((protected > 0.7).all()), protected
    else:
        assert bool(((protected > 0.02) & (protected < 0.1)).all()), protected
