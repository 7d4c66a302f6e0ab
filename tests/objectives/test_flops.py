"""The model FLOPs of every method's step against PyTorch's counter, to the last operation.

The counter sees the matrix products of a real forward and backward pass. What it sees and MFU leaves out is
taken off in closed form: the LM head's padding, and GradCache's first pass.
"""

from collections.abc import Sequence

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dga_scale.backbone.flops import ModelFlops, model_flops
from dga_scale.backbone.layers import freeze
from dga_scale.corpus.loading.batches import Batch, RowCounts, StepShape
from dga_scale.corpus.loading.shapes import pack_positions
from dga_scale.objectives.flops import step_flops
from dga_scale.objectives.grad_cache import cache_contrast
from dga_scale.objectives.methods import METHODS
from dga_scale.objectives.training_model import TrainingModel
from tests.helpers.batches import counts_of, joined, rows_of
from tests.helpers.comparison import training_model
from tests.helpers.small_experts import with_experts
from tests.helpers.toy import toy_batch, toy_lm, toy_protection

SETTINGS = {
    "adapter": {"adapter_size": 6},
    "ewc": {"general_corpus": "unused"},
    "infoword": {"infoword_weight": 0.5},
    "lora": {"lora_rank": 2},
    "prompt": {"prompt_tokens": 3},
    "taco": {"taco_negatives": 5},
}


def model_of(name: str, **settings: object) -> TrainingModel:
    lm = toy_lm(dropout=0.1)
    # Sequences of a text that is clustered already.
    model = training_model(
        name, with_experts(lm) if name == "cse" else lm, **SETTINGS.get(name, {}) | settings
    )
    if model.method.kinds:
        anatomy = model.anatomy
        rest = {kind: torch.zeros(anatomy.unit_shape(kind)) for kind in model.method.kinds}
        model.protection.set(rest | {"heads": toy_protection()})
    return model.train()


def counted(model: TrainingModel, micro_batches: Sequence[Batch]) -> float:
    """What torch counts in a step; its fused attention on CPUs would hide from it."""
    batch = joined(micro_batches)
    counts = counts_of(batch, 1 + int(batch.sources.max()), num_micro_batches=len(micro_batches))
    cached = [None] * len(micro_batches)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        if model.contrast is not None and model.contrast.spans(len(micro_batches)):
            cached = cache_contrast(model.contrast, micro_batches, model.contrasted)
        for each, of_contrast in zip(micro_batches, cached, strict=True):
            model(each, counts, cached=of_contrast)[0].backward()
    return counter.get_total_flops()


def shape_of(micro_batches: Sequence[Batch]) -> StepShape:
    batch = joined(micro_batches)
    taken = sum(len(b.input_ids if b.packed_positions is None else b.packed_positions) for b in micro_batches)
    mixed = int((batch.sources > 0).sum())
    labels = counts_of(batch, 1 + int(batch.sources.max())).labels_per_source
    rows = {batch.input_ids.shape[1]: RowCounts(taken, len(batch.input_ids), mixed)}
    return StepShape(rows, labels, len(micro_batches))


def flops_of(model: TrainingModel) -> ModelFlops:
    return model_flops(model.lm, model.anatomy)


def mixed(batch: Batch) -> Batch:
    """The same rows, two of three from another corpus."""
    sources = (torch.arange(len(batch.input_ids)) % 3).clamp(max=1)
    return rows_of(batch._replace(sources=sources), slice(None))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_counts_what_torch_counts(name: str) -> None:
    """Off what torch counts goes the padding of the LM head, and of kd's and kl's teacher's."""
    model, batch = model_of(name), toy_batch()
    if METHODS[name].needs_mix:
        batch = mixed(batch)
    shape, flops = shape_of([batch]), flops_of(model)
    padding = len(batch.labels) - shape.num_labels
    assert padding > 0
    padded = flops.training.head(padding)
    if name == "kd":
        padded += flops.forward.head(padding)
    if name == "kl":
        padded += flops.forward.head(len(batch.mixed_label_indices) - shape.labels_per_source[1])
    assert step_flops(model.method, flops, shape) == counted(model, [batch]) - padded


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
@pytest.mark.parametrize("views", ["paper", "shared"])
def test_a_contrast_over_all_micro_batches_has_more_keys_and_no_other_work(scope: str, views: str) -> None:
    """GradCache's first pass of what is contrasted is recomputed, and does not count."""
    model = model_of("dga", contrast_scope=scope, contrast_views=views)
    micro_batches = [rows_of(toy_batch(), part) for part in (slice(4), slice(4, 8))]
    shape, flops = shape_of(micro_batches), flops_of(model)
    positions = sum(len(batch.labels) for batch in micro_batches)
    besides = flops.training.head(positions - shape.num_labels)
    if scope == "global_batch":
        besides += flops.forward.trunk(3 * 8, 12)
    assert step_flops(model.method, flops, shape) == counted(model, micro_batches) - besides


def test_rows_count_as_they_are_packed() -> None:
    model, batch = model_of("dga"), toy_batch()
    lengths = batch.attention_mask.sum(dim=1).tolist()
    packed = batch._replace(packed_positions=torch.from_numpy(pack_positions(lengths, 12)))
    shape, flops = shape_of([packed]), flops_of(model)
    assert shape.rows_by_length[12].taken < 8
    padding = flops.training.head(len(batch.labels) - shape.num_labels)
    assert step_flops(model.method, flops, shape) == counted(model, [packed]) - padding
    assert step_flops(model.method, flops, shape) < step_flops(model.method, flops, shape_of([batch]))


@pytest.mark.parametrize("name", ["mlm", "adapted_deit"])
@pytest.mark.parametrize("layers", [1, 2])
def test_what_is_frozen_has_no_gradients(name: str, layers: int) -> None:
    """The token of AdaptedDeiT stands below all layers: in its own pass gradients go through them."""
    whole, model, batch = model_of(name), model_of(name), toy_batch()
    freeze(model.lm, model.anatomy, layers, True)
    shape, flops = shape_of([batch]), flops_of(model)
    padding = flops.training.head(len(batch.labels) - shape.num_labels)
    found = step_flops(model.method, flops, shape)
    assert found == counted(model, [batch]) - padding
    assert found < step_flops(whole.method, flops_of(whole), shape)


def test_a_step_of_general_text_without_labels_has_no_teacher() -> None:
    model = model_of("kl")
    shape = StepShape({12: RowCounts(8, 8, 2)}, (20, 0), 1)
    without = shape._replace(rows_by_length={12: RowCounts(8, 8, 0)})
    assert step_flops(model.method, flops_of(model), shape) == step_flops(
        model.method, flops_of(model), without
    )
