"""Routing, centres and experts against formulas written out, on small tensors and small models."""

import copy

import pytest
import torch
from torch import Tensor

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.errors import UserError
from dga_scale.experts.extension import collect_features, sparse_sublayers, sublayer_ids
from dga_scale.experts.routing import Router
from dga_scale.experts.sublayers import sublayer_modules
from tests.helpers.small_experts import ALPHA, ROWS, move_apart, only, with_experts
from tests.helpers.tiny_models import TINY

NO_EXPERTS = {"albert": ("attention", "ffn"), "bloom": ("attention",), "opt": ("ffn",)}


@pytest.mark.parametrize("name", TINY)
def test_output_is_the_dense_models(name: str) -> None:
    """All architectures, right after clustering, with several experts in use at every place."""
    dense = TINY[name].model()
    which = [kind for kind in ("attention", "ffn") if kind not in NO_EXPERTS.get(TINY[name].model_type, ())]
    if len(which) < 2:
        with pytest.raises(
            UserError,
            match="can't have experts. " + (f"Give --cse_experts {which[0]}" if which else "Take another"),
        ):
            with_experts(dense)
    if not which:
        return
    model = with_experts(copy.deepcopy(dense), "both" if len(which) == 2 else which[0], layers=2)
    with torch.no_grad():
        torch.testing.assert_close(model(**ROWS).logits, dense(**ROWS).logits, rtol=1e-5, atol=1e-5)
    for sublayer in sparse_sublayers(model).values():
        assert set(sublayer.last[1].tolist()) == {0, 1, 2}


@pytest.mark.parametrize("name", ["bert", "modernbert", "deberta-v3", "gpt2", "llama", "gpt_neox", "phi3"])
@pytest.mark.parametrize("which", ["attention", "ffn"])
def test_each_sequence_runs_its_experts_weights(name: str, which: str) -> None:
    """A dense model with expert j's weights in the sublayer's place gives the logits of j's sequences."""
    dense = TINY[name].model()
    model = with_experts(copy.deepcopy(dense), which)
    move_apart(model)
    names = sublayer_modules(anatomy_of(dense), 1, which)
    with torch.no_grad():
        logits = model(**ROWS).logits
        chosen = only(model).last[1]
        for index in range(3):
            alone = copy.deepcopy(dense)
            for module, expert in zip(names, only(model).expert(index), strict=True):
                alone.get_submodule(module).load_state_dict(expert.state_dict())
            expected = alone(**ROWS).logits
            own = chosen == index
            assert own.any()
            torch.testing.assert_close(logits[own], expected[own], rtol=1e-5, atol=1e-5)
            assert (logits[~own] - expected[~own]).abs().max() > 1e-3


def test_sublayers_of_each_kind() -> None:
    expected = {
        "bert": (("attention",), ("intermediate", "output")),
        "distilbert": (("attention",), ("ffn",)),
        "modernbert": (("attn",), ("mlp",)),
        "gpt2": (("attn",), ("mlp",)),
        "llama": (("self_attn",), ("mlp",)),
        "gpt_neox": (("attention",), ("mlp",)),
        "phi3": (("self_attn",), ("mlp",)),
    }
    for name, kinds in expected.items():
        anatomy = anatomy_of(TINY[name].model())
        for which, modules in zip(("attention", "ffn"), kinds, strict=True):
            found = sublayer_modules(anatomy, 1, which)
            assert tuple(module.split(".")[-1] for module in found) == modules
            assert all(module.split(".")[-2] == "1" for module in found)


def states_and_mask() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(5, 7, dtype=torch.long)
    mask[1, 4:] = 0
    mask[4, 2:] = 0
    return torch.randn(5, 7, 12, generator=generator), mask


def random_router(alpha: float = 0.99) -> Router:
    generator = torch.Generator().manual_seed(4)
    router = Router(12, 4, 3, alpha)
    router.projection.copy_(torch.randn(12, 4, generator=generator))
    router.centres.copy_(torch.randn(3, 4, generator=generator))
    router.radii.copy_(torch.tensor([0.8, 1.6, 1.4]))
    return router


def test_features_and_choice_are_the_formulas() -> None:
    states, mask = states_and_mask()
    router = random_router()
    features = router.features(states, mask)
    chosen = router.choose(features)
    for row in range(5):
        tokens = states[row, : int(mask[row].sum())].double()
        expected = tokens.mean(dim=0) @ router.projection.double()
        torch.testing.assert_close(features[row].double(), expected, rtol=1e-5, atol=1e-6)
        ratios = [
            ((expected - router.centres[j].double()) ** 2).sum().sqrt() / router.radii[j] for j in range(3)
        ]
        assert chosen[row] == min(range(3), key=lambda j, ratios=ratios: ratios[j])
    nearest = torch.cdist(features, router.centres).argmin(dim=1)
    assert len(set(chosen.tolist())) > 1
    assert not torch.equal(chosen, nearest), "radii count"
    torch.testing.assert_close(router.features(states, None), router.features(states, torch.ones(5, 7)))
    with pytest.raises(UserError, match=r"states of \(batch, tokens, width\)"):
        router.features(states.flatten(0, 1), mask)


def test_one_sequence_moves_its_centre_by_the_formula() -> None:
    router = random_router(alpha=0.9)
    before = router.centres.clone()
    feature = torch.tensor([[1.0, -2.0, 3.0, 0.5]])
    router.update(router.totals(feature, torch.tensor([1])))
    torch.testing.assert_close(router.centres[1], 0.9 * before[1] + 0.1 * feature[0])
    assert torch.equal(router.centres[[0, 2]], before[[0, 2]])


def test_equal_sequences_move_a_centre_as_one_after_the_other() -> None:
    router = random_router(alpha=0.9)
    expected = router.centres[2].double()
    feature = torch.tensor([1.0, -2.0, 3.0, 0.5])
    for _ in range(4):
        expected = 0.9 * expected + 0.1 * feature.double()
    router.update(router.totals(feature.expand(4, -1), torch.full((4,), 2)))
    torch.testing.assert_close(router.centres[2].double(), expected, rtol=1e-6, atol=1e-6)


def test_a_nan_does_not_reach_the_centres() -> None:
    router = random_router(alpha=0.9)
    before = router.centres.clone()
    features = torch.tensor([[float("nan"), 0, 0, 0], [1.0, 1.0, 1.0, 1.0]])
    router.update(router.totals(features, torch.tensor([0, 1])))
    assert torch.equal(router.centres[0], before[0])
    torch.testing.assert_close(router.centres[1], 0.9 * before[1] + 0.1)


def test_buffers_stay_fp32() -> None:
    router = random_router()
    exact = {name: buffer.clone() for name, buffer in router.named_buffers()}
    for cast in (router.bfloat16, router.half, lambda: router.to(torch.bfloat16), router.double):
        cast()
        for name, buffer in router.named_buffers():
            assert buffer.dtype == torch.float32
            assert torch.equal(buffer, exact[name])


@pytest.mark.parametrize("which", ["attention", "ffn"])
def test_a_tail_batch_moves_only_the_tail_expert_and_its_centre(which: str) -> None:
    model = with_experts(TINY["bert"].model(), which).train()
    sublayer = only(model)
    tail = 2
    rows = (sublayer.router.choose(features_of(model, which)) == tail).nonzero().flatten()
    assert 0 < len(rows) < 8
    sublayer.router.centres[tail] += 0.01  # it lies on the sequence that it was made from
    centres = sublayer.router.centres.clone()
    weights = [[p.clone() for m in sublayer.expert(i) for p in m.parameters()] for i in range(3)]
    only_tail = {name: tensor[rows] for name, tensor in ROWS.items()}
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # else the routes are those of noisy states
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    model(**only_tail, labels=only_tail["input_ids"]).loss.backward()
    optimizer.step()
    for index in range(3):
        now = [p for m in sublayer.expert(index) for p in m.parameters()]
        same = [torch.equal(a, b) for a, b in zip(weights[index], now, strict=True)]
        assert not any(same) if index == tail else all(same)
    moved = (sublayer.router.centres != centres).any(dim=1)
    assert moved.tolist() == [False, False, True]
    features, _ = sublayer.last
    kept = ALPHA ** len(rows)
    expected = kept * centres[tail] + (1 - kept) * features.mean(dim=0)
    torch.testing.assert_close(sublayer.router.centres[tail], expected)


def features_of(model: torch.nn.Module, which: str) -> Tensor:
    model.eval()
    with torch.no_grad():
        model(**ROWS)
    model.train()
    return only(model).last[0]


def test_centres_stand_still_in_evaluation_and_without_gradient() -> None:
    model = with_experts(TINY["gpt2"].model())
    before = [sublayer.router.centres.clone() for sublayer in sparse_sublayers(model).values()]
    model(**ROWS)
    model.train()
    with torch.no_grad():
        model(**ROWS)
    for sublayer, centres in zip(sparse_sublayers(model).values(), before, strict=True):
        assert torch.equal(sublayer.router.centres, centres)
    model(**ROWS)
    for sublayer, centres in zip(sparse_sublayers(model).values(), before, strict=True):
        assert not torch.equal(sublayer.router.centres, centres)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_checkpointed_blocks_give_the_same_gradients(name: str) -> None:
    """The second run of a block goes where the first one went, although the centres have moved since."""
    model = with_experts(TINY[name].model())
    move_apart(model)
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for each in (model, again):
        for module in each.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        each.train()
        loss = each(**ROWS, labels=ROWS["input_ids"]).loss
        for sublayer in sparse_sublayers(each).values():
            sublayer.router.centres.copy_(sublayer.router.centres.flip(0))
        loss.backward()
    for (parameter, own), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None), parameter
        if own.grad is not None:
            torch.testing.assert_close(other.grad, own.grad, rtol=1e-5, atol=1e-6)


def test_a_copy_of_the_model_runs_its_own_experts() -> None:
    model = with_experts(TINY["bert"].model())
    with torch.no_grad():
        logits = model(**ROWS).logits
        duplicate = copy.deepcopy(model)
        move_apart(model)
        assert torch.equal(duplicate(**ROWS).logits, logits)
        assert not torch.equal(model(**ROWS).logits, logits)


def test_cost_of_a_sequence_is_the_dense_models() -> None:
    """Rows that go through the sublayers' matrices, counted: those of the batch, whatever the experts."""
    model = with_experts(TINY["bert"].model())
    rows: dict[str, int] = {"attention": 0, "ffn": 0}

    def counting(kind: str) -> object:
        def count(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            rows[kind] += len(output)

        return count

    for place, sublayer in sparse_sublayers(model).items():
        for index in range(3):
            for module in sublayer.expert(index):
                for child in module.modules():
                    if isinstance(child, torch.nn.Linear):
                        child.register_forward_hook(counting(place.sublayer))
    with torch.no_grad():
        model(**ROWS)
    assert rows == {"attention": 4 * 8, "ffn": 2 * 8}  # query, key, value, output; up, down


def test_collected_features_are_those_of_routing() -> None:
    dense = TINY["roberta"].model()
    anatomy = anatomy_of(dense)
    sublayers = sublayer_ids(anatomy, 2, "both")
    halves = [(ROWS["input_ids"][i : i + 4], ROWS["attention_mask"][i : i + 4]) for i in (0, 4)]
    samples = collect_features(dense, anatomy, sublayers, halves, width=6, seed=0)
    model = with_experts(dense, layers=2)
    with torch.no_grad():
        model(**ROWS)
    for place, sublayer in sparse_sublayers(model).items():
        torch.testing.assert_close(sublayer.last[0], samples[place].features, rtol=1e-5, atol=1e-6)
        variance = samples[place].projection.var().item()
        assert variance == pytest.approx(1 / 6, rel=0.3)
    assert len({sample.projection.sum().item() for sample in samples.values()}) == 4


def test_what_is_refused() -> None:
    anatomy = anatomy_of(TINY["bert"].model())
    for layers in (0, 3):
        with pytest.raises(UserError, match=rf"--cse_layers {layers}: the model has 2 layers"):
            sublayer_ids(anatomy, layers, "both")
