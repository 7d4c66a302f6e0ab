"""The training loss and its gradient against the plain reference, whatever the split over ranks and steps."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.config.methods.dga import DGASettings
from dga_scale.config.methods.mlm import MLMSettings
from dga_scale.corpus.loading.masking import IGNORED
from dga_scale.objectives.methods import METHODS
from dga_scale.objectives.methods.dga import DGA
from dga_scale.objectives.methods.mlm import MaskedLM
from dga_scale.objectives.training_model import TrainingModel, evaluate_rows
from tests.helpers.batches import batch_of, counts_of, dense_labels, joined, rows_of, without_labels
from tests.helpers.comparison import loss_of
from tests.helpers.ranks import run_ranks
from tests.helpers.reference import Reference
from tests.helpers.tiny_models import TINY
from tests.helpers.toy import (
    HIDDEN,
    VOCAB,
    toy_batch,
    toy_lm,
    toy_model,
    toy_protection,
)

ROWS = 8


def gradients_of(model: TrainingModel) -> dict[str, Tensor]:
    return {
        name: parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        for name, parameter in model.lm.named_parameters()
    }


def assert_same_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=2e-6 * largest, msg=name)


def trained_part(
    method: str, accumulation: int, split_views: bool
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """On each rank: the gradient that DeepSpeed's averaging would give, and the mean of the logged terms."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if ranks > 1 else 0
    batch = toy_batch(ROWS)
    model = toy_model(method, split_views=split_views)
    if model.method.kinds:
        model.protection.set({"heads": toy_protection()})
    micro = ROWS // (ranks * accumulation)
    counts, sums = counts_of(batch, num_micro_batches=ranks * accumulation), dict[str, float]()
    for step in range(accumulation):
        start = (step * ranks + rank) * micro
        own = rows_of(batch, slice(start, start + micro))
        loss, terms = model(own, counts)
        (loss / accumulation).backward()
        for name, term in {"loss": loss, **terms}.items():
            sums[name] = sums.get(name, 0.0) + term.item() / accumulation
    gradients = gradients_of(model)
    if ranks > 1:
        for gradient in gradients.values():
            dist.all_reduce(gradient)
            gradient /= ranks
    return gradients, sums


def reference_gradients(method: str, contrast_rows: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    reference = Reference(
        toy_lm(), protection=toy_protection(), contrastive_weight=1.0 if method == "dga" else 0.0
    )
    step = reference.step(toy_batch(ROWS), contrast_rows=contrast_rows)
    terms = {"loss": step.loss, "mlm": step.mlm}
    return step.gradients, terms | ({"contrastive": step.contrastive} if method == "dga" else {})


@pytest.mark.parametrize("split_views", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("method", ["mlm", "dga"])
def test_loss_and_gradient_are_the_references(method: str, accumulation: int, split_views: bool) -> None:
    """Rows differ in their number of masks, so a mean of micro-steps' means would be another loss."""
    gradients, terms = trained_part(method, accumulation, split_views)
    expected, expected_terms = reference_gradients(method, ROWS // accumulation)
    assert terms == pytest.approx(expected_terms, rel=1e-5)
    assert_same_gradients(gradients, expected)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_have_the_gradient_of_the_global_batch(ranks: int, accumulation: int) -> None:
    parts = run_ranks(ranks, trained_part, "dga", accumulation, False)
    expected, expected_terms = reference_gradients("dga", ROWS // accumulation)
    for gradients, _ in parts:
        assert_same_gradients(gradients, expected)
    for name, value in expected_terms.items():
        assert sum(terms[name] for _, terms in parts) / ranks == pytest.approx(value, rel=1e-5)


def test_activation_checkpointing_repeats_gates_and_dropout() -> None:
    """The same seed gives the same loss and, to fp32 rounding, gradient; one pass holds gated views."""

    def run(checkpointing: bool) -> tuple[float, dict[str, Tensor]]:
        model = toy_model(dropout=0.1)
        model.protection.set({"heads": toy_protection()})
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(1)
        loss, _ = loss_of(model, toy_batch())
        model.gates.set(None)
        loss.backward()
        return loss.item(), gradients_of(model)

    (plain_loss, plain), (loss, recomputed) = run(False), run(True)
    assert loss == plain_loss
    assert_same_gradients(recomputed, plain)


def test_what_is_computed_gets_the_batch_itself() -> None:
    batch = toy_batch()
    assert toy_model()(batch, compute=lambda inputs: inputs) is batch
    with pytest.raises(AssertionError, match="needs the counts"):
        toy_model()(batch)


def test_a_weight_of_zero_leaves_the_contrast_views_out() -> None:
    assert [view.name for view in DGA(DGASettings(contrastive_weight=0.0)).views()] == ["mlm"]
    model, plain = toy_model("dga", contrastive_weight=0.0), toy_model("mlm")
    loss, terms = loss_of(model, toy_batch())
    assert terms.keys() == {"mlm"}
    assert torch.equal(loss, loss_of(plain, toy_batch())[0])


def test_temperature_and_weight_come_from_the_settings() -> None:
    lm = toy_lm()

    def loss_at(**values: float) -> tuple[float, dict[str, Tensor]]:
        method = DGA(DGASettings(**values))
        model = TrainingModel(lm, anatomy_of(lm), method)
        model.protection.set({"heads": toy_protection()})
        loss, terms = loss_of(model, toy_batch())
        model.gates.remove()
        return loss.item(), terms

    loss, terms = loss_at(contrastive_weight=0.25)
    assert loss == pytest.approx(terms["mlm"].item() + 0.25 * terms["contrastive"].item(), rel=1e-6)
    warmer = loss_at(temperature=1.0)[1]["contrastive"].item()
    reference = Reference(toy_lm(), protection=toy_protection(), temperature=1.0)
    assert warmer == pytest.approx(reference.contrastive_loss(toy_batch(), ROWS).item(), rel=1e-5)


def test_registry_names_the_methods_of_the_command_line() -> None:
    assert METHODS["mlm"] is MaskedLM
    assert METHODS["dga"] is DGA
    for name, method in METHODS.items():
        assert method.Settings.name == name
        assert method.Settings.summary
    assert MaskedLM(MaskedLM.Settings()).kinds == ()
    assert DGA(DGASettings()).kinds == ("heads",)
    assert [view.name for view in DGA(DGASettings()).views()] == ["mlm", "full", "full_plus", "general"]


@pytest.mark.parametrize("name", ["bert", "deberta-v3", "modernbert", "llama"])
def test_evaluation_scores_as_the_stock_model_does(name: str) -> None:
    """Sum of cross-entropies, labels and correct guesses from the stock model's full logits; eval mode."""
    lm = TINY[name].model()
    batch = toy_batch()
    model = TrainingModel(lm, anatomy_of(lm), MaskedLM(MLMSettings())).train()
    loss, count, correct = evaluate_rows(model, batch).sum(dim=0).tolist()
    assert model.training
    lm.eval()
    with torch.no_grad():
        logits = lm(input_ids=batch.masked_ids, attention_mask=batch.attention_mask).logits
    dense = dense_labels(batch)
    picked, labels = logits[dense != IGNORED].double(), dense[dense != IGNORED]
    assert loss == pytest.approx(F.cross_entropy(picked, labels, reduction="sum").item(), rel=1e-5)
    assert count == len(labels)
    assert correct == (picked.argmax(dim=-1) == labels).sum().item()


def test_rows_without_labels_do_not_count() -> None:
    """Padding a batch with an empty row changes no sum, also where nothing can be attended to."""
    batch = toy_batch()
    model = toy_model("mlm")
    expected = evaluate_rows(model, batch)
    padded = without_labels(joined([batch, rows_of(batch, [0])]), -1)
    padded.attention_mask[-1] = 0
    found = evaluate_rows(model, padded)
    torch.testing.assert_close(found[:-1], expected)
    assert not found[-1].any()


def test_lm_head_and_loss_run_on_masked_positions_of_the_mlm_view_only() -> None:
    """FLOPs as counted by torch: the head on N places, the trunk on four views of B * T tokens."""
    batch = toy_batch()
    assert len(batch.positions) == 32  # for 17 labels

    def flops(method: str) -> tuple[int, int]:
        model = toy_model(method)
        if model.method.kinds:
            model.protection.set({"heads": toy_protection()})
        with FlopCounterMode(display=False) as counter:
            loss_of(model, batch)
        counts = counter.get_flop_counts()
        return sum(counts["TrainingModel.lm.cls"].values()), sum(counts["TrainingModel.lm.bert"].values())

    head, trunk = flops("dga")
    assert head == 2 * 32 * (HIDDEN * HIDDEN + HIDDEN * VOCAB)
    assert (head, trunk) == (flops("mlm")[0], 4 * flops("mlm")[1])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_causal_models_train_on_the_next_token(name: str) -> None:
    """The positions and labels of a causal batch give the loss of the stock model's own ``labels``."""
    lm = TINY[name].model()  # in eval mode: GPT-2 has dropout
    ids = torch.randint(3, 90, (4, 9))
    labels = torch.cat([ids[:, 1:], ids.new_full((4, 1), IGNORED)], dim=1)
    batch = batch_of(ids, ids, torch.ones_like(ids), labels)
    model = TrainingModel(lm, anatomy_of(lm), MaskedLM(MLMSettings()))
    loss, _ = loss_of(model, batch)
    assert loss.item() == pytest.approx(lm(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
