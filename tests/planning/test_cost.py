"""Traffic and time against closed forms worked out by hand, FLOPs against those of training."""

import dataclasses
from pathlib import Path

import pytest

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.backbone.flops import model_flops
from dga_scale.corpus.loading.batches import RowCounts, StepShape
from dga_scale.objectives.flops import step_flops
from dga_scale.planning.activations import Batch, cached_states, gather_bytes
from dga_scale.planning.cost import (
    bus_bandwidth,
    collective,
    forward_backward_flops,
    moved_bytes,
    time,
    traffic,
    trunk_forwards,
)
from dga_scale.planning.gpus import GPUS
from dga_scale.planning.memory import share
from dga_scale.planning.models import PlannedModel
from tests.helpers.training import tiny_bert
from tests.planning.test_memory import plan_of, zero

BATCH = Batch(rows=8, length=128, labels=19, views=4, stacked=4)


@pytest.fixture(scope="module")
def dga() -> PlannedModel:
    return plan_of("roberta-base", "--method", "dga")


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_volumes_are_those_of_the_zero_paper(dga: PlannedModel, ranks: int) -> None:
    """arXiv 1910.02054, section 7, all in 16 bits and gradients reduce-scattered: 2P, 2P, 2P, 3P."""
    p, part = 2 * dga.parameters, (ranks - 1) / ranks
    for stage, factor in {0: 2, 1: 2, 2: 2, 3: 3}.items():
        settings = zero(stage, ranks, communication_bytes=2, all_reduce=False)
        found = traffic(dga, settings, BATCH, micro_steps=1)
        assert found.total - found.contrast == pytest.approx(factor * p * part)


def test_what_deepspeed_does_differently(dga: PlannedModel) -> None:
    p = dga.parameters
    found = traffic(dga, zero(2, 8), BATCH, micro_steps=3)
    assert found.gradients == pytest.approx(3 * 2 * 4 * p * 7 / 8)  # each pass, all-reduced, in fp32
    assert found.updated_weights == pytest.approx(2 * p * 7 / 8)
    assert traffic(dga, zero(1, 8), BATCH, micro_steps=3).gradients == pytest.approx(2 * 4 * p * 7 / 8)
    split = dataclasses.replace(BATCH, stacked=1)
    gathered = traffic(dga, zero(3, 8), split, micro_steps=3).gathered_weights
    assert gathered == pytest.approx(3 * (4 + 1) * 2 * p * 7 / 8)  # a forward pass for each view


def test_keys_of_the_contrast(dga: PlannedModel) -> None:
    """Received from the other ranks, two sides in fp32, and their gradients sent back, in each pass."""
    for ranks in (2, 1024):
        found = traffic(dga, zero(2, ranks), BATCH, micro_steps=2).contrast
        assert found == pytest.approx(2 * 2 * (ranks - 1) * 2 * 8 * 768 * 4)
    assert traffic(dga, zero(2, 1), BATCH, micro_steps=2).contrast == gather_bytes(dga, BATCH, 1) == 0


def test_a_contrast_over_all_passes_is_read_twice_and_gathered_once(dga: PlannedModel) -> None:
    """As many bytes in one gather; one more forward pass of what is contrasted, the LM view apart."""
    whole = plan_of("roberta-base", "--method", "dga", "--contrast_scope", "global_batch")
    settings, split = zero(3, 8), dataclasses.replace(BATCH, stacked=1)
    plain, spanning = (traffic(model, settings, BATCH, micro_steps=4) for model in (dga, whole))
    assert spanning.contrast == plain.contrast > 0
    assert spanning.gathers - plain.gathers == 2 * 4 * len(dga.sizes)
    assert plain.contrasts - spanning.contrasts == 2 * 3
    assert spanning.gathered_weights == pytest.approx(2 * plain.gathered_weights)  # 3 + 1 passes, not 1 + 1
    one, other = (traffic(model, settings, split, micro_steps=4).gathered_weights for model in (dga, whole))
    assert other == pytest.approx(one * (4 + 3 + 1) / (4 + 1))
    shared = plan_of(
        "roberta-base", "--method=dga", "--contrast_scope=global_batch", "--contrast_views=shared"
    )
    assert [trunk_forwards(model, BATCH, 4) for model in (dga, whole)] == [1, 3]
    assert trunk_forwards(shared, dataclasses.replace(BATCH, views=3, stacked=3), 4) == 2
    flops = {"ranks": 8, "checkpointing": False}
    (counted, computed, _), (same, more, _) = (
        forward_backward_flops(model, BATCH, micro_steps=4, **flops) for model in (dga, whole)
    )
    keys = (
        6 * (8 * 4 * 8) * 2 * (8 * 8) * 768
    )  # of a micro-batch; all four micro-batches have four times as many
    assert same - counted == 3 * keys
    assert more - computed == 3 * keys + dga.flops.forward.trunk(3 * 8 * 4 * 8, 128)
    assert cached_states(whole, BATCH, 4) == 2 * 3 * 8 * 4 * 768 * 4
    # Nothing to cache in a single pass.
    assert traffic(whole, settings, BATCH, micro_steps=1) == traffic(dga, settings, BATCH, micro_steps=1)
    assert forward_backward_flops(whole, BATCH, micro_steps=1, **flops)[0] == counted / 4
    assert cached_states(whole, BATCH, 1) == 0


def test_rings_share_the_network_cards_of_a_node() -> None:
    gpu = dataclasses.replace(GPUS["h100"], link_efficiency=1.0)
    assert bus_bandwidth(gpu, 8, 8) == 450e9
    assert bus_bandwidth(gpu, 16, 8) == 400e9
    assert bus_bandwidth(gpu, 16, 1) == 50e9


def test_a_collective_takes_its_bytes_and_its_hops() -> None:
    """By hand: 16 ranks in 2 machines have 14 hops inside and 1 between, a tree 7 and 1 each way."""
    gpu = dataclasses.replace(GPUS["h100"], link_efficiency=1.0)
    large, small = 400e9, 1.0
    assert collective(large, 1, gpu, 16, 8) == pytest.approx(1.0, rel=1e-3)  # the whole bandwidth
    assert collective(small, 3, gpu, 16, 8) == pytest.approx(3 * (14 * 0.85e-6 + 2.7e-6), rel=1e-3)
    found = collective(small, 1, gpu, 16, 8, all_reduce=True)
    assert found == pytest.approx(2 * (7 * 0.94e-6 + 5.0e-6), rel=1e-3)  # the tree
    two = collective(small, 1, gpu, 2, 8, all_reduce=True)
    assert two == pytest.approx(2 * 0.85e-6, rel=1e-3)  # the ring
    assert collective(large, 1, gpu, 1, 8) == collective(large, 0, gpu, 8, 8) == 0


def test_time_by_hand(dga: PlannedModel) -> None:
    """Nothing hidden: products, the other kernels' bytes, 50 bytes an entry of AdamW's, those on the bus."""
    gpu = dataclasses.replace(GPUS["h100"], product_efficiency=0.5, memory_efficiency=1.0, overlap=0.0)
    settings = zero(2, 16, overlap=True, reduce_bucket=10**9)
    found = time(dga, settings, BATCH, gpu, micro_steps=2, ranks_per_node=8, checkpointing=False)
    flops = forward_backward_flops(dga, BATCH, micro_steps=2, ranks=16, checkpointing=False)
    sent = traffic(dga, settings, BATCH, micro_steps=2)
    products = flops.computed / 16 / (989e12 * 0.5)
    moved = moved_bytes(dga, settings, BATCH, micro_steps=2, computed=1.0)
    assert found.compute == pytest.approx(products + moved / 3350e9)
    assert found.optimizer == pytest.approx(share(dga, settings) * 50 / 3350e9)
    assert found.exposed == pytest.approx(sent.total / (0.8 * 400e9), rel=0.1)  # and hops
    assert found.step == pytest.approx(found.compute + found.optimizer + found.exposed)
    assert 0 < found.communication_share < 1
    measured = dataclasses.replace(gpu, mfu=0.25)
    given = time(dga, settings, BATCH, measured, micro_steps=2, ranks_per_node=8, checkpointing=False)
    assert given.compute == pytest.approx(2 * products)


def test_bytes_of_the_other_kernels_by_hand(dga: PlannedModel) -> None:
    """RoBERTa's block in bf16: 5 f + 22 h of sums, norms and the activation, 12 h of attention, dropout."""
    h, tokens, p = 768, 8 * 128, dga.parameters
    block = 2 * (5 * 4 * h + 22 * h + 12 * h) + 16 * h + 4 * h
    head = 160 * 50265 * 44  # 8 rows with 19 labels, filled up
    plain = moved_bytes(dga, zero(0, 1), BATCH, micro_steps=1, computed=1.0)
    assert plain == 4 * tokens * 12 * block + head + 2 * p
    twice = moved_bytes(dga, zero(2, 8), BATCH, micro_steps=3, computed=2.0)
    assert twice == 3 * (2 * (plain - 2 * p) + (2 + 4 + 12) * p)  # into the bucket, to fp32 and back


def test_overlap_hides_no_more_than_there_is(dga: PlannedModel) -> None:
    def of(**changes: float) -> float:
        gpu = dataclasses.replace(GPUS["h100"], **changes)
        settings = zero(2, 64, overlap=True, reduce_bucket=10**9)
        return time(dga, settings, BATCH, gpu, micro_steps=1, ranks_per_node=8, checkpointing=False).exposed

    after = traffic(dga, zero(2, 64), BATCH, micro_steps=1)
    links = (GPUS["h100"], 64, 8)
    cannot_hide = collective(after.updated_weights, 1, *links) + collective(after.contrast, 2, *links)
    assert of(overlap=1.0, mfu=1e-4) == pytest.approx(cannot_hide)  # slow passes hide all
    assert of(overlap=0.5, mfu=1.0) > of(overlap=1.0, mfu=1.0) > cannot_hide


def test_flops_are_those_of_training(tmp_path: Path) -> None:
    """A model of 2 layers, the head on 15 labels filled up to 32; what is recomputed is no model FLOPs."""
    bert = tiny_bert()
    bert.config.to_json_file(tmp_path / "config.json", use_diff=False)
    batch, step = Batch(3, 16, labels=5, views=1, stacked=1), {"micro_steps": 2, "ranks": 4}
    shape = StepShape({16: RowCounts(24, 24, 12)}, (60, 60), 2)
    passes, padding = model_flops(bert, anatomy_of(bert)), 8 * (32 - 15)
    assert shape.num_labels + padding == 8 * 32
    for method, flags in {"mlm": (), "lora": (), "kd": (), "kl": ("--mix", "general:0.5")}.items():
        model = plan_of(str(tmp_path / "config.json"), "--method", method, *flags)
        counted, computed, views = forward_backward_flops(model, batch, checkpointing=False, **step)
        assert counted == step_flops(model.method, model.flops, shape), method
        assert (model.flops == passes) == (method != "lora")
        of_teacher = model.flops.forward.head(padding) if method in ("kd", "kl") else 0
        assert computed == counted + model.flops.training.head(padding) + of_teacher
        assert (views == computed) == (method in ("mlm", "lora"))
        recomputed = forward_backward_flops(model, batch, checkpointing=True, **step).computed
        assert recomputed == computed + model.flops.forward.trunk(24, 16)
