"""Units found in each architecture, against what the model itself computes and learns."""

import doctest
import re

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BertConfig, BertModel, PreTrainedModel, Starcoder2Config
from transformers.integrations import HfDeepSpeedConfig

from dga_scale.backbone import anatomy as anatomy_module
from dga_scale.backbone.anatomy import Anatomy, ParameterSlice, anatomy_of, register
from dga_scale.backbone.gates import Gates
from dga_scale.errors import UserError
from dga_scale.unit_kinds import UNIT_KINDS
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_models import COMMON, SIZES, TINY, VOCAB, batch

KINDS = tuple(UNIT_KINDS)

every_architecture = pytest.mark.parametrize("name", TINY)


def loss_of(model: PreTrainedModel) -> Tensor:
    """Cross-entropy of the full logits with the inputs: any loss that reaches every unit will do."""
    inputs = batch()
    logits = model(**inputs).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["input_ids"].flatten())


def protected_entries(model: PreTrainedModel, part: ParameterSlice, units: Tensor) -> Tensor:
    """Mark, in the parameter's shape, the entries all of whose units are among ``units``."""
    parameter = dict(model.named_parameters())[part.parameter]
    inside = torch.isin(part.unit_index, units).all(dim=1)  # a unit of -1 is never inside
    shape = [1] * parameter.dim()
    shape[part.dim] = -1
    return inside.view(shape).expand_as(parameter)


def same(left: Anatomy, right: Anatomy) -> bool:
    def plain(anatomy: Anatomy) -> list[object]:
        parts = [
            {**vars(part), "unit_index": part.unit_index.tolist()} for part in anatomy.slices(UNIT_KINDS)
        ]
        sizes = {name: value for name, value in vars(anatomy).items() if name != "projections"}
        modules = [(p.module, p.role, p.layer, p.transposed, p.bias) for p in anatomy.projections]
        return [sizes, modules, parts]

    return plain(left) == plain(right)


@every_architecture
def test_sizes_are_those_of_the_config(name: str) -> None:
    tiny = TINY[name]
    anatomy = anatomy_of(tiny.model())
    config = tiny.config()
    assert anatomy.architecture == tiny.model_type
    assert (anatomy.num_layers, anatomy.num_heads, anatomy.hidden_size) == (2, 4, 32)
    assert anatomy.head_dim == (12 if name in ("qwen3", "gemma", "gemma2", "gemma3") else 8)
    assert anatomy.intermediate_size == (128 if name in ("gpt2", "bloom") else 48)
    assert anatomy.vocab_size == config.vocab_size == VOCAB
    assert anatomy.causal == tiny.causal
    assert [anatomy.unit_shape(kind) for kind in KINDS] == [(2, 4), (2, anatomy.intermediate_size), (2, 32)]


@every_architecture
def test_max_positions_run_and_one_more_does_not(name: str) -> None:
    tiny = TINY[name]
    model = tiny.model()
    longest = anatomy_of(model).max_positions
    assert longest == tiny.max_positions
    longest = min(longest, 100)  # BLOOM's has no end
    assert model(torch.randint(3, VOCAB, (1, longest))).logits.shape == (1, longest, VOCAB)
    learned = re.search(r"position_embeddings|wpe", " ".join(dict(model.named_parameters())))
    if learned:  # rotary and relative positions have no table to run out of
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.randint(3, VOCAB, (1, longest + 1)))


@every_architecture
def test_lm_logits_are_bit_for_bit_those_of_the_model(name: str) -> None:
    model = TINY[name].model()
    anatomy = anatomy_of(model)
    inputs = batch()
    hidden = anatomy.trunk(model)(**inputs).last_hidden_state
    assert hidden.shape == (3, 11, 24 if name == "opt narrow" else 32)
    assert torch.equal(anatomy.lm_logits(model, hidden), model(**inputs).logits)


@every_architecture
def test_a_unit_owns_exactly_what_learns_nothing_when_it_is_gated_off(name: str) -> None:
    """The reference is autograd: with the gate at 0, a unit's entries, and no others, have no gradient."""
    model = TINY[name].model()
    anatomy = anatomy_of(model)
    gates = Gates(model, anatomy, KINDS)
    parameters = dict(model.named_parameters())
    layer = 1
    # A grouped key/value head is gated off only together with all its query heads.
    cases = [("heads", [2]), ("heads", [2, 3]), ("heads", [0, 1, 2, 3])]
    cases += [("ffn_intermediate", [5, 17]), ("ffn_output", [3, 30])]
    for kind, units in cases:
        rows = torch.ones(3, *anatomy.unit_shape(kind))
        rows[:, layer, units] = 0
        gates.set({kind: rows})
        model.zero_grad()
        loss_of(model).backward()
        parts = list(anatomy.slices([kind]))
        assert {part.layer for part in parts} == {0, 1}
        for parameter in {part.parameter for part in parts}:
            owned = torch.zeros_like(parameters[parameter], dtype=torch.bool)
            for part in parts:
                if part.parameter == parameter and part.layer == layer:
                    owned |= protected_entries(model, part, torch.tensor(units))
            gradient = parameters[parameter].grad
            assert gradient is not None
            assert not gradient[owned].any(), parameter
            if parameter.endswith("weight"):  # a key bias has no gradient at all: softmax ignores a shift
                assert gradient[~owned].eq(0).sum() <= 0.01 * owned.numel(), parameter


@every_architecture
def test_one_step_leaves_a_protected_head_where_it_was_and_moves_all_others(name: str) -> None:
    model = TINY[name].model()
    anatomy = anatomy_of(model)
    protection = torch.zeros(2, 4)
    protection[1, 2] = 1.0
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    parameters = dict(model.named_parameters())
    loss_of(model).backward()
    heads = list(anatomy.slices(["heads"]))
    for part in heads:
        # A grouped key/value head takes the smallest protection of its query heads; unit -1 has none.
        padded = torch.cat([protection[part.layer], torch.zeros(1)])
        factor = 1 - padded[part.unit_index].amin(dim=1)
        parameter = parameters[part.parameter]
        assert parameter.grad is not None
        parameter.grad.mul_(factor.view([-1 if axis == part.dim else 1 for axis in range(parameter.dim())]))
    torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0).step()

    for part in heads:
        moved = parameters[part.parameter] != before[part.parameter]
        for head in range(4):
            rows = (part.unit_index == head).any(dim=1).nonzero().flatten()
            expected = not (protection[part.layer, head] and part.unit_index[rows].eq(head).all())
            if part.parameter.endswith("weight"):
                assert moved.index_select(part.dim, rows).any() == expected, (part.parameter, head)
            elif not expected:
                assert not moved[rows].any(), (part.parameter, head)


@every_architecture
def test_no_parameter_of_a_head_is_left_out(name: str) -> None:
    """The reference is autograd again: what loses its gradient with the gate, anywhere in the model."""
    model = TINY[name].model()
    anatomy = anatomy_of(model)
    gates = Gates(model, anatomy)
    parameters = dict(model.named_parameters())
    for units in ([2], [2, 3]):
        owned = {key: torch.zeros_like(value, dtype=torch.bool) for key, value in parameters.items()}
        for part in anatomy.slices(["heads"]):
            if part.layer == 1:
                owned[part.parameter] |= protected_entries(model, part, torch.tensor(units))
        gradients = []
        for value in (1.0, 0.0):
            rows = torch.ones(3, 2, 4)
            rows[:, 1, units] = value
            gates.set({"heads": rows})
            model.zero_grad()
            loss_of(model).backward()
            gradients.append({key: parameter.grad for key, parameter in parameters.items()})
        for key, with_head in gradients[0].items():
            without = gradients[1][key]
            # A key bias has rounding noise for a gradient: softmax ignores a shift.
            if key.endswith("weight") and with_head is not None and without is not None:
                lost = with_head.ne(0) & without.eq(0)
                assert not (lost & ~owned[key]).sum() > 0.01 * lost.numel(), key


def test_grouped_keys_and_values_belong_to_their_query_heads() -> None:
    anatomy = anatomy_of(TINY["llama"].model())
    key = next(part for part in anatomy.slices(["heads"]) if part.role == "key")
    assert key.unit_index.tolist() == [[0, 1]] * 8 + [[2, 3]] * 8
    query = next(part for part in anatomy.slices(["heads"]) if part.role == "query")
    assert query.unit_index.flatten().tolist() == [head for head in range(4) for _ in range(8)]


@every_architecture
def test_meta_device_gives_the_same_anatomy(name: str) -> None:
    with torch.device("meta"):
        meta = TINY[name].model()
        found = anatomy_of(meta)
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}
    assert same(found, anatomy_of(TINY[name].model()))


def anatomies_under_zero_init() -> dict[str, Anatomy]:
    """Run on every rank: each architecture built under ``deepspeed.zero.Init``, as transformers does it."""
    stage3 = HfDeepSpeedConfig({"train_batch_size": 2, "zero_optimization": {"stage": 3}})
    found = {}
    for name, tiny in TINY.items():
        model = tiny.model(random_biases=False)
        assert all(parameter.numel() == 0 for parameter in model.parameters())
        found[name] = anatomy_of(model)
    del stage3  # transformers holds it weakly: gone with this reference
    return found


def test_partitioned_parameters_give_the_same_anatomy() -> None:
    for found in run_ranks(2, anatomies_under_zero_init):
        for name, anatomy in found.items():
            assert same(anatomy, anatomy_of(TINY[name].model())), name


@every_architecture
def test_lm_head_parameters_are_those_the_trunk_does_not_have(name: str) -> None:
    model = TINY[name].model()
    anatomy = anatomy_of(model)
    trunk = {id(parameter) for parameter in anatomy.trunk(model).parameters()}
    expected = {key for key, parameter in model.named_parameters() if id(parameter) not in trunk}
    assert set(anatomy.lm_head_parameters) == expected
    tied = ("gpt2", "llama tied", "gemma", "gemma2", "gemma3", "opt", "opt narrow", "bloom")
    assert bool(expected) == (name not in tied)  # heads that are the embeddings and no more


def test_the_docstring_of_register_runs_and_describes_starcoder2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anatomy_module, "_registered", {})
    values = {**COMMON, **SIZES, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(Starcoder2Config(**values)).eval()
    with pytest.raises(UserError, match=r"--import FILE\.py"):
        anatomy_of(model)
    (example,) = doctest.DocTestFinder(recurse=False).find(register, globs={})
    assert len(example.examples) == 4
    assert doctest.DocTestRunner().run(example, clear_globs=False).failed == 0
    anatomy = anatomy_of(model)
    inputs = batch()
    hidden = anatomy.trunk(model)(**inputs).last_hidden_state
    assert torch.equal(anatomy.lm_logits(model, hidden), model(**inputs).logits)
    assert anatomy.max_positions == 34


def test_unknown_architecture_is_refused_with_the_way_to_register() -> None:
    model = AutoModelForCausalLM.from_config(Starcoder2Config(**COMMON, **SIZES))
    with pytest.raises(UserError, match=r"'starcoder2' is not known.*bert, .*15 lines.*--import FILE\.py"):
        anatomy_of(model)


def test_model_without_lm_head_is_refused() -> None:
    with pytest.raises(UserError, match=r"BertModel has no module 'bert\.encoder.*AutoModelForMaskedLM"):
        anatomy_of(BertModel(BertConfig(**COMMON, **SIZES)))


def test_removed_projection_is_named() -> None:
    model = TINY["llama"].model()
    del model.model.layers[1].self_attn.k_proj
    with pytest.raises(UserError, match=r"no module 'model\.layers\.1\.self_attn\.k_proj'"):
        anatomy_of(model)


def test_pruned_head_is_named() -> None:
    model = TINY["bert"].model()
    attention = model.bert.encoder.layer[1].attention
    attention.self.query = torch.nn.Linear(32, 24)
    with pytest.raises(
        UserError, match=r"layer\.1\.attention\.self\.query maps 32 inputs to 24 outputs.*32 and 32.*pruned"
    ):
        anatomy_of(model)


def test_layer_with_a_smaller_ffn_is_named() -> None:
    model = TINY["llama"].model()
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 40, bias=False)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj maps 32 inputs to 40"):
        anatomy_of(model)
