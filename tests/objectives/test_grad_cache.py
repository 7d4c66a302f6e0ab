"""The contrast over all micro-steps, and the shared view, against forward passes that keep everything."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dga_scale.backbone.cpu_kernels import use_cpu_kernels
from dga_scale.corpus.loading.batches import Batch
from dga_scale.objectives.grad_cache import cache_contrast
from dga_scale.objectives.method import LM_VIEW
from dga_scale.objectives.training_model import TrainingModel
from dga_scale.objectives.views import run_views
from tests.helpers.batches import counts_of, rows_of
from tests.helpers.comparison import assert_same_gradients, gradients_of
from tests.helpers.ranks import run_ranks
from tests.helpers.reference import Reference
from tests.helpers.toy import toy_batch, toy_lm, toy_model, toy_protection

ROWS = 8
METHODS = ("dga", "das", "simcse", "infoword")

Found = tuple[dict[str, float], dict[str, Tensor]]


def protected_model(method: str, dropout: float = 0.0, **settings: object) -> TrainingModel:
    model = toy_model(method, dropout, **settings)
    anatomy, a = model.anatomy, {}
    for kind in model.method.kinds:
        generator = torch.Generator().manual_seed(0)
        a[kind] = torch.rand(anatomy.unit_shape(kind), generator=generator)
    if a:
        model.protection.set(a | {"heads": toy_protection()})
    return model


def micro_batches(accumulation: int, ranks: int = 1, rank: int = 0) -> list[Batch]:
    """This rank's part of the global batch."""
    size, batch = ROWS // (accumulation * ranks), toy_batch(ROWS)
    starts = [(step * ranks + rank) * size for step in range(accumulation)]
    return [rows_of(batch, slice(start, start + size)) for start in starts]


def stepped(model: TrainingModel, parts: list[Batch], ranks: int = 1) -> Found:
    """Means over micro-steps of what is logged, and of the gradients."""
    contrast = model.contrast
    counts = counts_of(toy_batch(ROWS), num_micro_batches=ranks * len(parts))
    assert contrast is not None
    caches = [None] * len(parts)
    if contrast.spans(len(parts)):
        caches = cache_contrast(contrast, parts, lambda inputs: model(inputs, compute=model.contrasted))
        assert not gradients_of(model), "the first forward pass left gradients"
    sums: dict[str, float] = {}
    for inputs, cached in zip(parts, caches, strict=True):
        loss, terms = model(inputs, counts, cached=cached)
        (loss / len(parts)).backward()
        for name, value in {"loss": loss, **terms}.items():
            sums[name] = sums.get(name, 0.0) + value.item() / len(parts)
    return sums, gradients_of(model.lm)


@pytest.mark.parametrize("views", ["paper", "shared"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_loss_and_gradient_are_those_of_plain_passes(views: str, accumulation: int) -> None:
    """Against the reference, which reads whole batches, one pass of the stock model a view."""
    model = protected_model("dga", contrast_views=views, contrast_scope="global_batch")
    terms, gradients = stepped(model, micro_batches(accumulation))
    reference = Reference(toy_lm(), protection=toy_protection(), shared_view=views == "shared")
    step = reference.step(toy_batch(ROWS))
    expected = {"loss": step.loss, "mlm": step.mlm, "contrastive": step.contrastive}
    assert terms == pytest.approx(expected, rel=1e-6)
    assert_same_gradients(gradients, {name: step.gradients[name] for name in gradients})


def test_the_shared_view_is_the_lm_losses() -> None:
    method = protected_model("dga", contrast_views="shared").method
    views, contrast = method.views(), method.contrast()
    assert contrast is not None
    assert [(view.masked, view.gated) for view in views] == [(True, False), (False, False), (False, True)]
    assert contrast.views == views
    assert contrast.views[0] == LM_VIEW  # the anchors: all keys are of clean text


def on_ranks(accumulation: int) -> list[Found]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found = []
    for method in METHODS:
        model = protected_model(method, contrast_scope="global_batch")
        terms, gradients = stepped(model, micro_batches(accumulation, ranks, rank), ranks)
        for gradient in gradients.values():
            dist.all_reduce(gradient)
            gradient /= ranks
        found.append((terms, gradients))
    return found


def test_ranks_and_micro_steps_change_nothing() -> None:
    """Each rank's and micro-step's examples have the same negatives however the global batch is split."""
    by_rank = run_ranks(2, on_ranks, 2)
    for number, method in enumerate(METHODS):
        expected_terms, expected = stepped(protected_model(method), micro_batches(1))
        terms = [part[number][0] for part in by_rank]
        means = {name: sum(of[name] for of in terms) / 2 for name in expected_terms}
        assert means == pytest.approx(expected_terms, rel=1e-6), method
        for part in by_rank:
            assert_same_gradients(part[number][1], expected)


@pytest.mark.parametrize(
    ("views", "split", "checkpointing", "kernels"),
    [
        ("paper", False, False, False), ("paper", True, False, False), ("paper", False, True, False),
        ("paper", False, False, True), ("shared", False, False, False),
    ],
)  # fmt: skip
def test_second_forward_passes_repeat_the_dropout_of_the_first(
    views: str, split: bool, checkpointing: bool, kernels: bool
) -> None:
    """Plain: the states of all micro-batches drawn once, with gradient; then the LM loss's forward passes."""
    settings = {"contrast_views": views, "contrast_scope": "global_batch", "split_views": split}
    parts, labels = micro_batches(4), counts_of(toy_batch(ROWS)).num_labels
    plain = protected_model("dga", dropout=0.1, **settings)
    if kernels:
        use_cpu_kernels(plain.lm)
    contrast = plain.contrast
    assert contrast is not None
    torch.manual_seed(5)
    trunk = plain.anatomy.trunk(plain.lm)
    found = [
        run_views(trunk, plain.gates, contrast.views, inputs, plain.protection.a, split=split)
        for inputs in parts
    ]
    states = [contrast.pooled(of.hidden, inputs) for of, inputs in zip(found, parts, strict=True)]
    contrastive = contrast.loss([torch.cat(side) for side in zip(*states, strict=True)])
    mlm = []
    for inputs, of in zip(parts, found, strict=True):
        hidden = of.hidden.get(LM_VIEW.name)
        if hidden is None:
            hidden = trunk(inputs.masked_ids, attention_mask=inputs.attention_mask).last_hidden_state
        logits = plain.anatomy.lm_logits(plain.lm, hidden)  # (B, T, V)
        kept = inputs.labels != -100
        scores = logits.flatten(0, 1)[inputs.positions[kept]].log_softmax(dim=-1)
        mlm.append(-scores.gather(1, inputs.labels[kept, None]).sum())
    loss = torch.stack(mlm).sum() / labels + contrastive
    loss.backward()

    model = protected_model("dga", dropout=0.1, **settings)
    if kernels:
        use_cpu_kernels(model.lm)
    if checkpointing:
        model.enable_gradient_checkpointing()
    torch.manual_seed(5)
    terms, gradients = stepped(model, parts)
    assert terms["contrastive"] == pytest.approx(contrastive.item(), rel=1e-6)
    assert terms["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert_same_gradients(gradients, gradients_of(plain.lm))


def test_memory_is_that_of_one_micro_batch() -> None:
    """What waits for a backward pass does not grow with the number of micro-steps."""

    def kept(accumulation: int) -> int:
        model, largest, now = protected_model("dga", contrast_scope="global_batch"), 0, 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal now, largest
            now += tensor.numel()
            largest = max(largest, now)
            return tensor

        contrast, parts = model.contrast, micro_batches(8)[:accumulation]
        assert contrast is not None
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            caches = cache_contrast(contrast, parts, lambda inputs: model(inputs, compute=model.contrasted))
            for inputs, cached in zip(parts, caches, strict=True):
                now = 0
                model(inputs, counts_of(inputs), cached=cached)[0].backward()
        return largest

    assert kept(8) < 1.1 * kept(2)
