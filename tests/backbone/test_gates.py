"""Virtual gates, against models whose weights are edited by hand and against runs of one example each."""

import itertools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.backbone.gates import Gates
from dga_scale.errors import UserError
from dga_scale.unit_kinds import UNIT_KINDS
from tests.helpers.tiny_models import TINY, VOCAB, batch

KINDS = tuple(UNIT_KINDS)

every_architecture = pytest.mark.parametrize("name", TINY)


def ones(model: PreTrainedModel, rows: int = 3) -> dict[str, Tensor]:
    anatomy = anatomy_of(model)
    return {kind: torch.ones(rows, *anatomy.unit_shape(kind)) for kind in KINDS}


def random_rows(model: PreTrainedModel, seed: int, rows: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {kind: torch.rand(gates.shape, generator=generator) for kind, gates in ones(model, rows).items()}


@torch.no_grad()
def zero_inputs(module: torch.nn.Module, inputs: slice) -> None:
    """Zero the weights that read some of a projection's inputs: GPT-2 stores them as rows."""
    if type(module).__name__ == "Conv1D":
        module.weight[inputs] = 0
    else:
        module.weight[:, inputs] = 0


@torch.no_grad()
def zero_outputs(module: torch.nn.Module, outputs: slice) -> None:
    if type(module).__name__ == "Conv1D":
        module.weight[:, outputs] = 0
    else:
        module.weight[outputs] = 0
    if module.bias is not None:
        module.bias[outputs] = 0


@every_architecture
@torch.no_grad()
def test_gate_zero_removes_the_unit(name: str) -> None:
    """The head's columns of the output projection set to zero, and likewise for the FFN's units."""
    for kind in KINDS:
        model = TINY[name].model()
        anatomy = anatomy_of(model)
        gates = Gates(model, anatomy, KINDS)
        untouched = model(**batch()).logits
        rows = ones(model)
        rows[kind][:, 1, 2] = 0
        gates.set(rows)
        gated = model(**batch()).logits
        gates.remove()
        if kind == "heads":
            width = anatomy.head_dim
            zero_inputs(model.get_submodule(anatomy.attention_outputs[1]), slice(2 * width, 3 * width))
        elif kind == "ffn_intermediate":
            zero_inputs(model.get_submodule(anatomy.ffn_outputs[1]), slice(2, 3))
        else:
            zero_outputs(model.get_submodule(anatomy.ffn_outputs[1]), slice(2, 3))
        removed = model(**batch()).logits
        torch.testing.assert_close(gated, removed, rtol=0, atol=1e-6)
        assert (gated - untouched).abs().max() > 1e-3


@every_architecture
@torch.no_grad()
def test_gates_of_one_or_none_change_no_bit(name: str) -> None:
    kernels = ["eager", "sdpa"] if TINY[name].sdpa else ["eager"]
    for dtype, attn_implementation in itertools.product((torch.float32, torch.bfloat16), kernels):
        model = TINY[name].model(attn_implementation=attn_implementation).to(dtype)
        bare = model(**batch()).logits
        gates = Gates(model, anatomy_of(model), KINDS)
        assert torch.equal(model(**batch()).logits, bare)
        gates.set(ones(model))
        assert torch.equal(model(**batch()).logits, bare)
        gates.set(random_rows(model, seed=1))
        assert not torch.equal(model(**batch()).logits, bare)
        gates.set(None)
        assert torch.equal(model(**batch()).logits, bare)
        gates.set(random_rows(model, seed=1))
        gates.remove()
        assert torch.equal(model(**batch()).logits, bare)


@every_architecture
def test_each_example_has_its_own_gates_and_gate_gradients(name: str) -> None:
    model = TINY[name].model()
    gates = Gates(model, anatomy_of(model), KINDS)
    inputs = batch()
    rows = {kind: value.requires_grad_() for kind, value in random_rows(model, seed=1).items()}
    gates.set(rows)
    together = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    gradients = torch.autograd.grad(together[real].square().sum(), list(rows.values()))
    for example in range(3):
        own = {kind: value[example : example + 1].detach().requires_grad_() for kind, value in rows.items()}
        gates.set(own)
        alone = model(**{key: value[example : example + 1] for key, value in inputs.items()}).logits
        alone = alone[real[example : example + 1]]
        torch.testing.assert_close(together[example][real[example]], alone, rtol=1e-5, atol=1e-5)
        expected = torch.autograd.grad(alone.square().sum(), list(own.values()))
        for found, one in zip(gradients, expected, strict=True):
            scale = one.abs().max().item()
            torch.testing.assert_close(found[example : example + 1], one, rtol=1e-5, atol=2e-6 * scale)


def test_gate_gradient_is_the_finite_difference_of_the_loss() -> None:
    model = TINY["gpt2"].model().double()
    gates = Gates(model, anatomy_of(model), KINDS)

    def loss(*rows: Tensor) -> Tensor:
        gates.set(dict(zip(KINDS, rows, strict=True)))
        return model(**batch()).logits.square().mean()

    rows = [value.double().requires_grad_() for value in random_rows(model, seed=1).values()]
    assert torch.autograd.gradcheck(loss, rows, fast_mode=True)


def three_forwards(
    model: PreTrainedModel, gates: Gates, rows: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Run forwards with given gates, with none, with others, and one backward.

    Returns the loss, the gradients of the parameters and those of the gates.
    """
    torch.manual_seed(0)
    model.zero_grad()
    model.train()
    loss = torch.zeros(())
    settings: list[Callable[[], dict[str, Tensor] | None]] = [
        lambda: rows,
        lambda: None,
        lambda: {kind: value.detach().flip(0) for kind, value in rows.items()},
    ]
    for weight, setting in enumerate(settings, start=1):
        gates.set(setting())
        loss = loss + weight * model(**batch()).logits.square().mean()
    loss.backward()
    parameters = {
        key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None
    }
    gate_gradients = {kind: value.grad.clone() for kind, value in rows.items() if value.grad is not None}
    return loss.detach(), parameters, gate_gradients


def enable_checkpointing(model: PreTrainedModel, context_fn: Callable[[], object]) -> None:
    options = {"use_reentrant": False, "context_fn": context_fn}
    with warnings.catch_warnings():  # renamed in the middle of transformers 5; the old name stays until 6
        warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if tiny.checkpoints])
def test_activation_checkpointing_recomputes_with_the_gates_of_each_forward(name: str) -> None:
    tiny = TINY[name]
    probabilities = [
        key
        for key, value in tiny.config().to_dict().items()
        if "drop" in key and key != "layerdrop" and value is not None
    ]
    dropout = dict.fromkeys(probabilities, 0.1)
    model = tiny.model(**dropout)
    gates = Gates(model, anatomy_of(model), KINDS)
    rows = {kind: value.requires_grad_() for kind, value in random_rows(model, seed=1).items()}
    loss, parameters, gate_gradients = three_forwards(model, gates, rows)
    for value in rows.values():
        value.grad = None
    checkpointed = 0

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        nonlocal checkpointed
        checkpointed += 1
        return gates.checkpoint_contexts()

    enable_checkpointing(model, contexts)
    again_loss, again_parameters, again_gate_gradients = three_forwards(model, gates, rows)
    assert checkpointed == 3 * 2  # every block of every forward was checkpointed
    # Where a block's tensors lie decides how some kernels round, so not to the last bit; other gates or draws
    # would show in the first digits.
    torch.testing.assert_close(again_loss, loss, rtol=1e-6, atol=0)
    assert set(again_parameters) == set(parameters)
    for again, before in ((again_parameters, parameters), (again_gate_gradients, gate_gradients)):
        largest = max(gradient.abs().max().item() for gradient in before.values())
        for key, gradient in before.items():
            # A key bias has rounding noise for a gradient: softmax ignores a shift.
            rounding = max(3e-6 * gradient.abs().max().item(), 1e-7 * largest)
            torch.testing.assert_close(again[key], gradient, rtol=1e-6, atol=rounding)


def test_backward_twice_through_a_checkpointed_block_binds_the_gates_twice() -> None:
    model = TINY["bert"].model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    gates = Gates(model, anatomy_of(model))
    enable_checkpointing(model, gates.checkpoint_contexts)
    rows = random_rows(model, seed=1)["heads"].requires_grad_()
    bare = model(**batch()).logits
    gates.set({"heads": rows})
    loss = model(**batch()).logits.square().mean()
    gates.set(None)
    (first,) = torch.autograd.grad(loss, rows, retain_graph=True)
    (second,) = torch.autograd.grad(loss, rows)
    assert first.abs().max() > 0
    assert torch.equal(first, second)
    assert torch.equal(model(**batch()).logits, bare)  # and unbinds them


@torch.no_grad()
def test_ffn_computed_in_chunks_is_gated_alike() -> None:
    model = TINY["bert"].model()
    gates = Gates(model, anatomy_of(model), KINDS)
    gates.set(random_rows(model, seed=1))
    inputs = {key: value[:, :8] for key, value in batch().items()}
    whole = model(**inputs).logits
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 4
    torch.testing.assert_close(model(**inputs).logits, whole, rtol=0, atol=1e-6)


def test_activations_that_match_no_examples_are_refused() -> None:
    model = TINY["modernbert"].model()
    gates = Gates(model, anatomy_of(model))
    gates.set({"heads": torch.ones(3, 2, 4)})
    with pytest.raises(UserError, match=r"shape \(2, 5, 32\) can't be matched with the gates of 3 examples"):
        model(torch.randint(3, VOCAB, (2, 5)))
    flat = torch.zeros(7, 32)  # what an attention path that drops padding hands on
    with pytest.raises(UserError, match=r"shape \(7, 32\).*attn_implementation"):
        model.model.layers[0].attn.Wo(flat)


def test_gates_of_a_wrong_kind_or_size_are_refused() -> None:
    model = TINY["bert"].model()
    gates = Gates(model, anatomy_of(model))
    with pytest.raises(ValueError, match=r"no gates for 'ffn_output'"):
        gates.set({"ffn_output": torch.ones(3, 2, 32)})
    with pytest.raises(ValueError, match=r"must be \(batch, 2, 4\), got \(2, 4\)"):
        gates.set({"heads": torch.ones(2, 4)})
