"""The faults of the released DGA and DAS code (docs/methods.md), by number: each check fails on the fault.

Each test holds the property that the fault breaks and, beside it, the faulty computation, to show that the
check tells the two apart. Fault 10, a schedule that ignores the step budget, is that of
tests/train/test_schedule.py.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor
from torch.distributions import Categorical
from torch.utils.flop_counter import FlopCounterMode

from dga_scale.corpus.loading.batches import Batch, Counts
from dga_scale.errors import UserError
from dga_scale.objectives.contrast import contrastive_loss
from dga_scale.objectives.views import mean_pool, run_views
from dga_scale.preservation.divergence import kl_divergence
from dga_scale.preservation.importance import measure_importance
from dga_scale.preservation.soft_mask import GradientMask, UpdateMask, mask_factors
from tests.helpers.batches import batch_of, dense_labels, rows_of
from tests.helpers.comparison import loss_of
from tests.helpers.ranks import run_ranks
from tests.helpers.toy import (
    HEADS,
    HIDDEN,
    LAYERS,
    VOCAB,
    toy_batch,
    toy_model,
    toy_protection,
)
from tests.preservation.test_soft_mask import cut

ROWS = 8


def proxy_kl_gate_gradients(batch: Batch, train: bool, seed: int) -> Tensor:
    """Gradient of the mean proxy KL with respect to one set of gates, as the released code forms it."""
    model = toy_model(dropout=0.1).train(train)
    torch.manual_seed(seed)
    gates = torch.ones(1, LAYERS, HEADS, requires_grad=True)
    log_probabilities = []
    for _ in range(2):
        model.gates.set({"heads": gates.expand(len(batch.input_ids), -1, -1)})
        hidden = model.lm.bert(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        log_probabilities.append(model.lm.cls(hidden).log_softmax(dim=-1))
    first, second = log_probabilities
    divergence = (first.exp() * (first - second)).sum(dim=-1).mean()
    return torch.autograd.grad(divergence, gates)[0].detach()[0]


def test_fault_1_importance_in_eval_mode() -> None:
    """In eval mode the passes are identical and the gradient is noise, below 1e-4 of the true one."""
    batch = toy_batch(32)
    noise = proxy_kl_gate_gradients(batch, train=False, seed=0).abs().max()
    assert noise < 1e-4 * proxy_kl_gate_gradients(batch, train=True, seed=0).abs().max()
    with pytest.raises(ValueError, match="train"):
        measure_importance(toy_model(dropout=0.1).eval(), [batch])
    with pytest.raises(UserError, match="--dropout"):
        measure_importance(toy_model(dropout=0.0), [batch])

    def measured(seed: int) -> Tensor:
        model = toy_model(dropout=0.1)
        torch.manual_seed(seed)
        return (
            measure_importance(model, [toy_batch(32, seed=10 * seed + number) for number in range(6)])
            .values["heads"]
            .flatten()
        )

    assert spearmanr(measured(1), measured(2)).statistic > 0.5


def in_batches(size: int, order: Sequence[int]) -> list[Batch]:
    batch = rows_of(toy_batch(ROWS), list(order))
    return [rows_of(batch, slice(start, start + size)) for start in range(0, ROWS, size)]


def signed_and_accumulated(batches: list[Batch]) -> Tensor:
    """The released code: signed gradients of batch means, never zeroed between batches, summed; then |.|."""
    model = toy_model()
    gates = torch.ones(1, LAYERS, HEADS, requires_grad=True)
    total = torch.zeros(LAYERS, HEADS)
    for batch in batches:
        model.gates.set({"heads": gates.expand(len(batch.input_ids), -1, -1)})
        loss, _ = toy_loss(model, batch)
        loss.backward()
        assert gates.grad is not None
        total += gates.grad[0]
    return (total / len(batches)).abs()


def toy_loss(model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean over examples of the masked LM loss of each, under the gates that are set."""
    hidden = model.lm.bert(batch.masked_ids, attention_mask=batch.attention_mask).last_hidden_state
    labels = dense_labels(batch)
    losses = F.cross_entropy(model.lm.cls(hidden).transpose(1, 2), labels, reduction="none")  # (B, T)
    per_example = losses.sum(dim=1) / (labels != -100).sum(dim=1)
    return per_example.mean(), per_example


def spread_over_splits(measure: Callable[[list[Batch]], Tensor]) -> float:
    """Largest relative change of an importance over batch sizes and orders of the same 8 examples."""
    expected = measure(in_batches(8, range(ROWS)))
    worst = 0.0
    for size, order in ((1, range(ROWS)), (2, range(ROWS - 1, -1, -1)), (4, [3, 1, 4, 0, 5, 2, 6, 7])):
        found = measure(in_batches(size, order))
        worst = max(worst, ((found - expected).abs() / expected).max().item())
    return worst


def test_fault_2_signed_sums_and_gradients_that_are_never_zeroed() -> None:
    """Importance doesn't depend on batch size or order; nor on world size, see the tests of importance."""
    assert spread_over_splits(lambda b: measure_importance(toy_model(), b, loss="mlm").values["heads"]) < 1e-4
    assert spread_over_splits(signed_and_accumulated) > 0.1


@pytest.mark.parametrize("soft_mask", ["gradient", "update"])
def test_fault_3_masks_along_the_input_axis(soft_mask: str) -> None:
    """With a = 1 on head 1 one step leaves exactly its rows of Q, K, V and its columns of the output."""
    model = toy_model("mlm")
    a = torch.zeros(LAYERS, HEADS)
    a[:, 1] = 1.0
    factors = mask_factors(model.anatomy, {"heads": a})
    weights = {name: parameter.detach() for name, parameter in model.lm.named_parameters()}
    fragments = cut(weights, 1, torch.Generator())
    update_mask = UpdateMask(model.anatomy, factors if soft_mask == "update" else {})
    if soft_mask == "gradient":
        GradientMask(model.lm.named_parameters(), model.anatomy).set(factors)
    before = {name: weight.clone() for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-12, weight_decay=0)
    loss, _ = loss_of(model, toy_batch())
    loss.backward()
    update_mask.before_step(fragments)
    optimizer.step()
    update_mask.after_step(fragments)

    rows = torch.zeros(HIDDEN, dtype=torch.bool)
    rows[8:16] = True
    for layer in range(LAYERS):
        block = f"bert.encoder.layer.{layer}.attention."
        for projection in ("query", "key", "value"):
            moved = weights[f"{block}self.{projection}.weight"] != before[f"{block}self.{projection}.weight"]
            assert not moved[rows].any()
            assert moved[~rows].float().mean() > 0.99
            moved = weights[f"{block}self.{projection}.bias"] != before[f"{block}self.{projection}.bias"]
            assert not moved[rows].any()
            if projection != "key":  # a shift of all keys changes no attention: its gradient is 0
                assert moved[~rows].all()
        moved = weights[f"{block}output.dense.weight"] != before[f"{block}output.dense.weight"]
        assert not moved[:, rows].any()
        assert moved[:, ~rows].float().mean() > 0.99
        assert (weights[f"{block}output.dense.bias"] != before[f"{block}output.dense.bias"]).all()


def pooled_views(model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
    hidden = run_views(
        model.anatomy.trunk(model.lm),
        model.gates,
        model.method.views(),
        batch,
        {"heads": toy_protection()},
    ).hidden
    return {name: mean_pool(states, batch.attention_mask) for name, states in hidden.items()}


def test_fault_4_a_positive_pair_of_two_different_sentences() -> None:
    """With dropout off both views of a sentence are one: cos(u_i, v_i) = 1."""
    pooled = pooled_views(toy_model(), toy_batch())
    cosine = F.cosine_similarity(pooled["full"], pooled["full_plus"])
    torch.testing.assert_close(cosine, torch.ones(ROWS), rtol=0, atol=1e-6)
    # The fault: sentences tiled one way (1 2 1 2) and taken apart the other (1 2 | 1 2 -> pairs 1, 2).
    tiled = torch.cat([pooled["full"], pooled["full_plus"]]).view(ROWS, 2, HIDDEN)
    assert F.cosine_similarity(tiled[:, 0], tiled[:, 1]).max() < 0.999


def pooled_states() -> Tensor:
    return torch.randn(3, ROWS, HIDDEN, generator=torch.Generator().manual_seed(0))


def gradient_on_ranks(faulty: bool) -> Tensor:
    """On each rank: the averaged gradient of its own states (3, own rows, H)."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    states = pooled_states()[:, own].clone().requires_grad_()
    if faulty:
        # The released code: gathered without gradient, the own slice put back live, the whole square.
        everything = pooled_states()
        live = torch.cat([everything[:, : own.start], states, everything[:, own.stop :]], dim=1)
        u, v, w = F.normalize(live, dim=-1)
        loss = F.cross_entropy(u @ torch.cat([v, w]).T / 0.05, torch.arange(ROWS))
    else:
        loss = contrastive_loss(*states, 0.05)
    loss.backward()
    assert states.grad is not None
    return states.grad / ranks


def test_fault_5_all_gather_without_gradient() -> None:
    """The gradient at W ranks x B is that of one process at W * B; the fault's is 1 / W of it."""
    states = pooled_states().requires_grad_()
    contrastive_loss(*states, 0.05).backward()
    assert states.grad is not None
    for ranks in (2, 4):
        ours = torch.cat(run_ranks(ranks, gradient_on_ranks, False), dim=1)
        faulty = torch.cat(run_ranks(ranks, gradient_on_ranks, True), dim=1)
        torch.testing.assert_close(ours, states.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(faulty, states.grad / ranks, rtol=1e-5, atol=1e-6)


def test_fault_6_divergence_over_the_token_axis_and_reversed() -> None:
    """0 where teacher and student agree, the reference's elsewhere, with the gradient of the reference."""
    teacher, student = torch.randn(2, 5, VOCAB), torch.randn(2, 5, VOCAB, requires_grad=True)
    assert not kl_divergence(teacher, teacher).any()
    reference = torch.distributions.kl_divergence(Categorical(logits=teacher), Categorical(logits=student))
    divergence = kl_divergence(teacher, student)
    torch.testing.assert_close(divergence, reference, rtol=1e-5, atol=1e-6)
    (ours,) = torch.autograd.grad(divergence.sum(), student)
    torch.testing.assert_close(ours, student.softmax(-1) - teacher.softmax(-1), rtol=1e-4, atol=1e-6)
    faulty = F.kl_div(teacher.log_softmax(dim=1), student.softmax(dim=1), reduction="none").sum(dim=-1)
    assert (faulty - reference).abs().min() > 0.1


def test_fault_7_pooling_counts_padding() -> None:
    """A padded batch pools as each sentence on its own, unpadded."""
    model, batch = toy_model(), toy_batch()
    padded = pooled_views(model, batch)
    for row, length in enumerate(batch.attention_mask.sum(dim=1).tolist()):
        one = rows_of(batch, slice(row, row + 1))
        alone = batch_of(
            one.input_ids[:, :length],
            one.masked_ids[:, :length],
            one.attention_mask[:, :length],
            dense_labels(one)[:, :length],
        )
        for name, states in pooled_views(model, alone).items():
            torch.testing.assert_close(padded[name][row], states[0], rtol=1e-4, atol=1e-5)
    hidden = model.lm.bert(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    assert (hidden.mean(dim=1) - padded["full"]).abs().max() > 1e-2


def masked_gradients(micro_steps: int, faulty: bool = False) -> dict[str, Tensor]:
    """Gradient of the masked LM loss of 8 rows in ``micro_steps`` backward passes, soft-masked."""
    model, batch = toy_model("mlm"), toy_batch(ROWS)
    factors = mask_factors(model.anatomy, {"heads": toy_protection()})
    if not faulty:
        GradientMask(model.lm.named_parameters(), model.anatomy).set(factors)
    size = ROWS // micro_steps
    for start in range(0, ROWS, size):
        loss, _ = loss_of(model, rows_of(batch, slice(start, start + size)), Counts((16,), 1))
        loss.backward()
        if faulty:  # the released code: the accumulated gradient is masked after each backward pass
            for name, parameter in model.lm.named_parameters():
                for factor in factors.get(name, ()):
                    along = [-1 if dim == factor.dim else 1 for dim in range(parameter.dim())]
                    assert parameter.grad is not None
                    parameter.grad *= factor.scale.view(along)
    return {name: p.grad for name, p in model.lm.named_parameters() if p.grad is not None}


def test_fault_8_the_mask_is_applied_again_at_each_micro_step() -> None:
    expected = masked_gradients(1)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for micro_steps in (2, 4, 8):
        for name, gradient in masked_gradients(micro_steps).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=2e-6 * largest)
    faulty, name = masked_gradients(4, faulty=True), "bert.encoder.layer.0.attention.self.query.weight"
    protected = slice(8, 16)  # a = 0.95: the first micro-steps' share all but vanishes
    assert faulty[name][protected].norm() < 0.7 * expected[name][protected].norm()


def test_fault_9_head_and_loss_on_the_contrast_passes() -> None:
    """FLOPs of the LM head are those of the places with a label (rounded up), the contrast included."""
    model, batch = toy_model("dga"), toy_batch()
    model.protection.set({"heads": toy_protection()})
    with FlopCounterMode(display=False) as counter:
        loss_of(model, batch)
    with FlopCounterMode(display=False) as faulty:
        for _ in range(4):
            model.lm(batch.input_ids, attention_mask=batch.attention_mask)
    expected = 2 * len(batch.positions) * (HIDDEN * HIDDEN + HIDDEN * VOCAB)
    assert sum(counter.get_flop_counts()["TrainingModel.lm.cls"].values()) == expected
    assert sum(
        faulty.get_flop_counts()["BertForMaskedLM.cls"].values()
    ) == expected * 4 * batch.input_ids.numel() / len(batch.positions)
