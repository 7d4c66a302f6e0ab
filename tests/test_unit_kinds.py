"""A kind of unit is one entry of a table: made-up ones, against plain PyTorch that knows of no table."""

import doctest
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dga_scale import unit_kinds
from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.backbone.gates import Gates
from dga_scale.errors import UserError
from dga_scale.objectives.methods.dga import DGA, DGASettings
from dga_scale.objectives.training_model import TrainingModel
from dga_scale.preservation.importance import measure_importance
from dga_scale.preservation.movement import MovementTracker
from dga_scale.preservation.protection import Protection
from dga_scale.preservation.soft_mask import UpdateMask, mask_factors
from dga_scale.unit_kinds import (
    UNIT_KINDS,
    Channels,
    ProjectionSide,
    UnitKind,
    by_channel,
    by_head,
    unit_kind,
)
from tests.helpers.batches import counts_of, dense_labels, rows_of
from tests.helpers.reference import Reference
from tests.helpers.tiny_models import TINY, batch
from tests.helpers.toy import HEADS, LAYERS, toy_batch, toy_lm, toy_model
from tests.preservation.test_soft_mask import cut


def by_pair(channels: Channels) -> Tensor:
    return by_head(channels) // 2  # -1 stays -1


PAIRS = UnitKind(
    name="head_pairs",
    words="pairs of attention heads",
    shape=lambda sizes: (sizes.num_layers, sizes.num_heads // 2),
    owns=(
        ProjectionSide("query", "output", by_pair),
        ProjectionSide("key", "output", by_pair),
        ProjectionSide("value", "output", by_pair),
        ProjectionSide("output", "input", by_pair),
    ),
    own_rows="query",
    gate=ProjectionSide("output", "input", by_pair),
)
VALUES = ProjectionSide("value", "output", by_channel)
VALUE_UNITS = UnitKind(
    name="value_units",
    words="value units",
    shape=lambda sizes: (sizes.num_layers, sizes.width("value")),
    owns=(VALUES,),
    own_rows="value",
    gate=VALUES,
)
PAIR_PROTECTION = torch.tensor([[0.0, 1.0], [0.75, 0.25]])


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (PAIRS, VALUE_UNITS):
        monkeypatch.setitem(UNIT_KINDS, kind.name, kind)


@pytest.mark.parametrize("soft_mask", ["gradient", "update"])
def test_pairs_of_heads_train_as_the_reference_does_with_equal_heads(soft_mask: str) -> None:
    """Gates of the contrast's general view, masks and movement; a pair with a = 1 keeps its bits."""
    reference = Reference(
        toy_lm(),
        protection=PAIR_PROTECTION.repeat_interleave(2, dim=1),
        soft_mask=soft_mask,
        learning_rate=1e-2,
        eps=1e-2,
    )
    lm, method = toy_lm(), DGA(DGASettings(protect=["head_pairs"]))
    protection = Protection(lm, kinds=method.kinds, soft_mask=soft_mask)
    model = TrainingModel(lm, protection.anatomy, method, protection=protection).train()
    weights = {name: parameter.detach() for name, parameter in lm.named_parameters()}
    start = {name: weight.clone() for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2, eps=1e-2, weight_decay=0.0)
    protection.attach(optimizer)
    protection.set({"head_pairs": PAIR_PROTECTION})
    for seed in range(2):
        rows = toy_batch(seed=seed)
        optimizer.zero_grad()
        loss, _ = model(rows, counts_of(rows))
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(reference.step(rows).loss, rel=1e-5)
    for name, expected in reference.weights.items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-4, atol=1e-5, msg=name)
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(weights[query][16:], start[query][16:])
    assert (weights[query][:16] != start[query][:16]).any(dim=1).all()

    moved = protection.effective()
    for layer in range(LAYERS):
        name = f"bert.encoder.layer.{layer}.attention.self.query."
        squares = [
            (reference.weights[name + leaf] - start[name + leaf]).square().view(HEADS // 2, -1)
            for leaf in ("weight", "bias")
        ]
        expected = torch.cat(squares, dim=1).mean(dim=1).sqrt()
        torch.testing.assert_close(moved["head_pairs"].movement[layer], expected, rtol=1e-3, atol=1e-6)


def test_importance_is_the_mean_gate_gradient_of_hooks_set_by_hand() -> None:
    """Both at once, an example at a time on the stock model: gates on an input, and on an output."""
    rows, lm = toy_batch(4), toy_lm()
    model = toy_model("dga", protect=["value_units", "head_pairs"])
    found = measure_importance(model, [rows], kinds=("value_units", "head_pairs"), loss="mlm").values
    sums = {"head_pairs": torch.zeros(LAYERS, HEADS // 2), "value_units": torch.zeros(LAYERS, 32)}

    def on_input(gate: Tensor) -> Callable[..., tuple[Tensor]]:
        return lambda module, inputs: (inputs[0] * gate.repeat_interleave(16),)

    def on_output(gate: Tensor) -> Callable[..., Tensor]:
        return lambda module, inputs, output: output * gate

    for row in range(4):
        gates = {kind: torch.ones_like(total, requires_grad=True) for kind, total in sums.items()}
        hooks = []
        for number, layer in enumerate(lm.bert.encoder.layer):
            attention, pairs, values = layer.attention, gates["head_pairs"], gates["value_units"]
            hooks.append(attention.output.dense.register_forward_pre_hook(on_input(pairs[number])))
            hooks.append(attention.self.value.register_forward_hook(on_output(values[number])))
        one = rows_of(rows, slice(row, row + 1))
        length = int(one.attention_mask.sum())
        logits = lm(input_ids=one.masked_ids[:, :length]).logits[0]
        loss = F.cross_entropy(logits, dense_labels(one)[0, :length])
        for kind, gradient in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
            sums[kind] += gradient.abs() / 4
        for hook in hooks:
            hook.remove()
    for kind, expected in sums.items():
        torch.testing.assert_close(found[kind], expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "gpt2", "gpt_neox", "llama"])
def test_gate_zero_removes_a_value_unit_of_a_fused_projection_too(name: str) -> None:
    """Values are the whole of a module, its last third, a part of each head's rows, or shared by heads."""
    weight, unit = {
        "bert": ("bert.encoder.layer.1.attention.self.value.weight", 11),
        "gpt2": ("transformer.h.1.attn.c_attn.weight", 64 + 11),  # transposed
        "gpt_neox": ("gpt_neox.layers.1.attention.query_key_value.weight", 1 * 24 + 16 + 3),  # of head 1
        "llama": ("model.layers.1.self_attn.v_proj.weight", 11),
    }[name]
    model = TINY[name].model()
    gates = Gates(model, anatomy_of(model), ["value_units"])
    untouched = model(**batch()).logits
    rows = torch.ones(3, *anatomy_of(model).unit_shape("value_units"))
    rows[:, 1, 11] = 0
    gates.set({"value_units": rows})
    gated = model(**batch()).logits
    gates.remove()
    parameters = dict(model.named_parameters())
    if name == "gpt2":
        parameters[weight][:, unit] = 0
    else:
        parameters[weight][unit] = 0
    if (bias := parameters.get(weight.replace("weight", "bias"))) is not None:
        bias[unit] = 0
    torch.testing.assert_close(gated, model(**batch()).logits, rtol=0, atol=1e-6)
    assert (gated - untouched).abs().max() > 1e-4


def test_kinds_that_share_rows_mask_them_together_and_are_measured_apart() -> None:
    """GPT-2 keeps queries and values in one matrix: heads own all of it, value units the last third."""
    lm = TINY["gpt2"].model()
    anatomy, name = anatomy_of(lm), "transformer.h.0.attn.c_attn.weight"
    weights = {key: parameter.detach() for key, parameter in lm.named_parameters()}
    start = weights[name].clone()
    heads, values = torch.zeros(2, 4), torch.zeros(2, 32)
    heads[0, 1], values[0, 8], values[0, 30] = 0.5, 0.5, 1.0  # value unit 8 is in head 1, 30 in head 3
    protection = {"heads": heads, "value_units": values}
    fragments = cut(weights, 4, torch.Generator().manual_seed(0))
    tracker = MovementTracker(anatomy, fragments, tuple(protection))
    mask = UpdateMask(anatomy, mask_factors(anatomy, protection), tuple(protection))
    mask.before_step(fragments)
    for weight in weights.values():
        weight += 1
    mask.after_step(fragments)
    expected = torch.ones(96)
    expected[8:16] = expected[40:48] = expected[72:80] = 0.5
    expected[64 + 8], expected[64 + 30] = 0.25, 0.0
    torch.testing.assert_close(weights[name] - start, expected.expand(32, -1), rtol=0, atol=1e-5)
    moved = tracker.movement(fragments, lambda sums: sums)
    torch.testing.assert_close(moved["heads"][0], torch.tensor([1, 0.5, 1, 1]), rtol=0, atol=1e-5)
    torch.testing.assert_close(moved["value_units"][0], expected[64:], rtol=0, atol=1e-5)
    ratios = mask.applied_over_proposed(lambda sums: sums)
    torch.testing.assert_close(ratios["heads"][0], torch.tensor([1, 0.5, 1, 1]))
    torch.testing.assert_close(ratios["value_units"][0], expected[64:])


def test_a_kind_without_a_gate_is_masked_and_refused_where_gates_are_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bare = UnitKind("bare", "bare units", PAIRS.shape, PAIRS.owns, own_rows="query")
    monkeypatch.setitem(UNIT_KINDS, "bare", bare)
    lm = toy_lm()
    anatomy = anatomy_of(lm)
    masks = [mask_factors(anatomy, {kind: PAIR_PROTECTION}) for kind in ("bare", "head_pairs")]
    assert masks[0].keys() == masks[1].keys()
    with pytest.raises(UserError, match=r"bare units have no gate"):
        Gates(lm, anatomy, ["bare"])


def test_an_unknown_kind_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"no kind of unit 'neurons'.*heads, ffn_intermediate, ffn_output"):
        unit_kind("neurons")


def test_the_docstring_registers_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(UNIT_KINDS, "value_units")
    (example,) = (test for test in doctest.DocTestFinder(recurse=False).find(unit_kinds) if test.examples)
    assert doctest.DocTestRunner().run(example).failed == 0
    assert anatomy_of(TINY["llama"].model()).unit_shape("value_units") == (2, 16)
