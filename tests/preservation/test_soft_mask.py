"""Masks on the gradient and on the step, against plain PyTorch on whole parameters."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from dga_scale.backbone.anatomy import Anatomy, Projection, anatomy_of
from dga_scale.preservation.fragments import Fragment
from dga_scale.preservation.soft_mask import Factor, GradientMask, UpdateMask, mask_factors
from dga_scale.unit_kinds import Channels, Role
from tests.helpers.reference import mask_of
from tests.helpers.tiny_models import TINY
from tests.helpers.toy import HEADS, LAYERS, toy_lm, toy_protection


def whole(factors: tuple[Factor, ...], shape: torch.Size) -> Tensor:
    """The mask of a parameter in its full shape."""
    mask = torch.ones(shape)
    for factor in factors:
        mask *= factor.scale[torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")[factor.dim]]
    return mask


def test_factors_are_those_of_the_reference() -> None:
    """BERT by anatomy against BERT by the names of its parameters: every parameter, the unmasked too."""
    lm, a = toy_lm(), toy_protection()
    factors = mask_factors(anatomy_of(lm), {"heads": a})
    for name, parameter in lm.named_parameters():
        mask = whole(factors[name], parameter.shape) if name in factors else torch.ones_like(parameter)
        torch.testing.assert_close(mask, mask_of(name, parameter, 1 - a), rtol=0, atol=0)
    assert len(factors) == LAYERS * 7


def test_a_layer_without_protection_has_no_factors() -> None:
    a = toy_protection()
    a[1] = 0
    factors = mask_factors(anatomy_of(toy_lm()), {"heads": a})
    assert factors.keys()
    assert all(".layer.0." in name for name in factors)


@pytest.mark.parametrize(
    ("rule", "expected"), [("min", [0.1, 0.3]), ("max", [0.9, 0.4]), ("mean", [0.5, 0.35])]
)
def test_grouped_key_heads_combine_the_protection_of_their_queries(rule: str, expected: list[float]) -> None:
    """Llama, 4 query heads on 2 key/value heads of 8 rows."""
    lm = TINY["llama"].model()
    a = torch.tensor([[0.1, 0.9, 0.3, 0.4], [0.0, 0.0, 0.0, 0.0]])
    factors = mask_factors(anatomy_of(lm), {"heads": a}, kv_protection=rule)
    for role in ("k_proj", "v_proj"):
        (factor,) = factors[f"model.layers.0.self_attn.{role}.weight"]
        torch.testing.assert_close(factor.scale, 1 - torch.tensor(expected).repeat_interleave(8))
    (factor,) = factors["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(factor.scale, 1 - a[0].repeat_interleave(8))


@pytest.mark.parametrize("rule", ["min", "max", "mean"])
def test_rows_of_no_unit_stay_unmasked(rule: str) -> None:
    """Padding rows and those of something else than a unit belong to unit -1."""
    anatomy = anatomy_of(toy_lm())
    keys = Channels(torch.arange(3), torch.tensor([[0, 1], [2, -1], [-1, -1]]))
    hidden = Channels(torch.arange(32))
    anatomy = dataclasses.replace(
        anatomy, projections=(Projection("k", "key", 0, hidden, keys, False, False),)
    )
    a = torch.tensor([[0.25, 0.75, 0.5, 1.0], [0.0, 0.0, 0.0, 0.0]])
    (factor,) = mask_factors(anatomy, {"heads": a}, kv_protection=rule)["k.weight"]
    shared = {"min": 0.25, "max": 0.75, "mean": 0.5}[rule]
    torch.testing.assert_close(factor.scale, 1 - torch.tensor([shared, 0.5, 0.0]))


def test_fused_projection_is_masked_on_queries_keys_and_values() -> None:
    """GPT-2's c_attn holds (in, 3 * hidden): all three thirds have the heads' factors, along axis 1."""
    a = torch.tensor([[0.0, 0.5, 0.25, 1.0], [0.1, 0.2, 0.3, 0.4]])
    factors = mask_factors(anatomy_of(TINY["gpt2"].model()), {"heads": a})
    (factor,) = factors["transformer.h.0.attn.c_attn.weight"]
    assert factor.dim == 1
    torch.testing.assert_close(factor.scale, 1 - a[0].repeat_interleave(8).repeat(3))


def test_protection_outside_its_range_or_shape_is_refused() -> None:
    anatomy = anatomy_of(toy_lm())
    with pytest.raises(ValueError, match="amplify"):
        mask_factors(anatomy, {"heads": torch.full((LAYERS, HEADS), -0.1)})
    with pytest.raises(ValueError, match="amplify"):
        mask_factors(anatomy, {"heads": torch.full((LAYERS, HEADS), float("nan"))})
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        mask_factors(anatomy, {"heads": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match="kv_protection"):
        mask_factors(anatomy, {"heads": torch.zeros(LAYERS, HEADS)}, kv_protection="median")


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "gpt_neox", "modernbert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_mask_multiplies_each_gradient(name: str, dtype: torch.dtype) -> None:
    """Fused, separate and grouped projections; summed over two backward passes as accumulation does."""
    lm = TINY[name].model().to(dtype)
    anatomy = anatomy_of(lm)
    a = torch.rand(anatomy.num_layers, anatomy.num_heads)
    mask = GradientMask(lm.named_parameters(), anatomy)
    ids = [torch.randint(3, 90, (2, 7)), torch.randint(3, 90, (2, 7))]

    def gradients() -> dict[str, Tensor]:
        lm.zero_grad()
        for micro_step in ids:
            lm(input_ids=micro_step).logits.float().square().mean().backward()
        return {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}

    plain = gradients()
    factors = mask_factors(anatomy, {"heads": a})
    mask.set(factors)
    masked = gradients()
    epsilon = 1e-6 if dtype == torch.float32 else 1e-2  # rounding of sums of two products, which may cancel
    for parameter_name, gradient in masked.items():
        assert gradient.dtype == dtype
        full = whole(factors.get(parameter_name, ()), gradient.shape)
        expected = plain[parameter_name].float() * full
        torch.testing.assert_close(
            gradient.float(), expected, rtol=epsilon, atol=epsilon * expected.abs().max().item()
        )


def cut(weights: dict[str, Tensor], pieces: int, generator: torch.Generator) -> list[Fragment]:
    """Cut each parameter at random offsets, as ZeRO cuts at any."""
    fragments = []
    for name, weight in weights.items():
        flat = weight.view(-1)
        ends = torch.randint(0, len(flat) + 1, (pieces - 1,), generator=generator).tolist()
        offsets = sorted({0, len(flat), *ends})
        for start, end in pairwise(offsets):
            fragments.append(Fragment(name, start, tuple(weight.shape), flat[start:end]))
    return fragments


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "gpt_neox", "deberta-v3", "modernbert"])
@pytest.mark.parametrize("pieces", [1, 2, 7])
def test_update_mask_scales_the_step_of_adamw(name: str, pieces: int) -> None:
    """Weight decay included, for any cut; exactly the old bits at a = 1, exactly the new ones at a = 0."""
    lm = TINY[name].model()
    anatomy = anatomy_of(lm)
    a = torch.rand(anatomy.num_layers, anatomy.num_heads)
    a[:, 0], a[:, 1] = 0.0, 1.0
    factors = mask_factors(anatomy, {"heads": a}, kv_protection="max")
    masked = {n: p.detach().clone().requires_grad_() for n, p in lm.named_parameters()}
    plain = {n: p.detach().clone().requires_grad_() for n, p in lm.named_parameters()}
    mask = UpdateMask(anatomy, factors)
    fragments = cut({n: p.detach() for n, p in masked.items()}, pieces, torch.Generator().manual_seed(pieces))
    optimizers = [torch.optim.AdamW(w.values(), lr=1e-2, weight_decay=0.1) for w in (masked, plain)]
    for _ in range(3):
        for parameter_name, parameter in plain.items():
            masked[parameter_name].grad = parameter.grad = torch.randn_like(parameter)
        before = {n: p.detach().clone() for n, p in masked.items()}
        with torch.no_grad():
            for parameter_name, parameter in plain.items():
                parameter.copy_(masked[parameter_name])
        mask.before_step(fragments)
        optimizers[0].step()
        mask.after_step(fragments)
        optimizers[1].step()
        for parameter_name, parameter in plain.items():
            scale = whole(factors.get(parameter_name, ()), parameter.shape)
            start, moved = before[parameter_name], masked[parameter_name].detach()
            expected = start + scale * (parameter.detach() - start)
            torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-8)
            assert torch.equal(moved[scale == 0], start[scale == 0])
            assert torch.equal(moved[scale == 1], parameter.detach()[scale == 1])


def test_update_mask_keeps_the_sign_of_a_frozen_zero() -> None:
    """-0.0 + 0 * step would be +0.0: bits of a fully protected head have to stay."""
    lm = toy_lm()
    anatomy = anatomy_of(lm)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    weight = torch.full((32, 32), -0.0)
    fragments = [Fragment(name, 0, (32, 32), weight.view(-1))]
    mask = UpdateMask(anatomy, mask_factors(anatomy, {"heads": torch.ones(LAYERS, HEADS)}))
    mask.before_step(fragments)
    weight.fill_(float("nan"))
    mask.after_step(fragments)
    assert torch.equal(weight, torch.zeros(32, 32))
    assert bool(weight.signbit().all())


def two_axes_anatomy() -> Anatomy:
    """The toy, its layer-0 query weight masked along rows by heads and along columns by heads."""
    anatomy = anatomy_of(toy_lm())
    by_head = Channels(torch.arange(32), torch.arange(HEADS).repeat_interleave(8).unsqueeze(1))
    name = "bert.encoder.layer.0.attention.self.query"
    roles: tuple[Role, ...] = ("query", "output")
    both = tuple(Projection(name, role, 0, by_head, by_head, False, False) for role in roles)
    return dataclasses.replace(anatomy, projections=both)


@pytest.mark.parametrize("offsets", [(0, 1024), (0, 5, 1024), (0, 33, 70, 71, 600, 1024)])
def test_masks_along_two_axes_of_one_parameter_multiply(offsets: tuple[int, ...]) -> None:
    anatomy = two_axes_anatomy()
    a = torch.tensor([[0.0, 1.0, 0.5, 0.25], [0.0, 0.0, 0.0, 0.0]])
    scale = (1 - a[0]).repeat_interleave(8)
    expected_mask = scale[:, None] * scale[None, :]
    factors = mask_factors(anatomy, {"heads": a})

    # From far away, so that start + (end - start) rounds to another number than end.
    start, end = 1e4 * torch.randn(32, 32), torch.randn(32, 32)
    weight = start.clone()
    name = f"{anatomy.projections[0].module}.weight"
    fragments = [Fragment(name, low, (32, 32), weight.view(-1)[low:high]) for low, high in pairwise(offsets)]
    mask = UpdateMask(anatomy, factors)
    mask.before_step(fragments)
    weight.copy_(end)
    mask.after_step(fragments)
    torch.testing.assert_close(weight, start + expected_mask * (end - start), rtol=1e-6, atol=1e-2)
    assert torch.equal(weight[expected_mask == 0], start[expected_mask == 0])
    assert torch.equal(weight[expected_mask == 1], end[expected_mask == 1])

    parameter = nn.Parameter(torch.zeros(32, 32))
    hooks = GradientMask([(name, parameter)], anatomy)
    hooks.set(factors)
    (parameter * end).sum().backward()
    torch.testing.assert_close(parameter.grad, end * expected_mask, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_applied_over_proposed_is_what_the_mask_asks_for(name: str) -> None:
    """Summed over steps and cuts; 1 for the heads that are not masked; counted afresh after a call."""
    lm = TINY[name].model()
    anatomy = anatomy_of(lm)
    a = torch.rand(anatomy.num_layers, anatomy.num_heads)
    a[:, 0], a[:, 1] = 0.0, 1.0
    weights = {n: p.detach() for n, p in lm.named_parameters()}
    fragments = cut(weights, 3, torch.Generator().manual_seed(0))
    mask = UpdateMask(anatomy, mask_factors(anatomy, {"heads": a}))
    for _ in range(2):
        mask.before_step(fragments)
        for weight in weights.values():
            weight += torch.randn_like(weight)
        mask.after_step(fragments)
    calls = []

    def reduce(tensor: Tensor) -> Tensor:
        calls.append(tensor)
        return tensor * 2  # as two ranks with the same shards

    torch.testing.assert_close(mask.applied_over_proposed(reduce)["heads"], 1 - a, rtol=1e-5, atol=1e-6)
    assert len(calls) == 2
    torch.testing.assert_close(mask.applied_over_proposed(reduce)["heads"], torch.ones_like(a))


def test_ffn_units_can_be_masked_too() -> None:
    """DAS: rows of the up-projection by intermediate unit, of the down-projection by output unit."""
    lm = toy_lm()
    anatomy = anatomy_of(lm)
    protection = {
        "ffn_intermediate": torch.rand(LAYERS, anatomy.intermediate_size),
        "ffn_output": torch.rand(LAYERS, anatomy.hidden_size),
    }
    kinds = tuple(protection)
    factors = mask_factors(anatomy, protection)
    layer = "bert.encoder.layer.1."
    assert factors.keys() == {
        f"bert.encoder.layer.{n}.{module}.dense.{leaf}"
        for n in range(LAYERS)
        for module in ("intermediate", "output")
        for leaf in ("weight", "bias")
    }
    (up,), (down,) = factors[layer + "intermediate.dense.weight"], factors[layer + "output.dense.weight"]
    assert up.dim == down.dim == 0
    torch.testing.assert_close(up.scale, 1 - protection["ffn_intermediate"][1])
    torch.testing.assert_close(down.scale, 1 - protection["ffn_output"][1])

    weights = {n: p.detach() for n, p in lm.named_parameters()}
    fragments = cut(weights, 2, torch.Generator().manual_seed(1))
    mask = UpdateMask(anatomy, factors, kinds)
    mask.before_step(fragments)
    for weight in weights.values():
        weight += torch.randn_like(weight)
    mask.after_step(fragments)
    ratios = mask.applied_over_proposed(lambda tensor: tensor)
    for kind, a in protection.items():
        torch.testing.assert_close(ratios[kind], 1 - a, rtol=1e-4, atol=1e-5)
