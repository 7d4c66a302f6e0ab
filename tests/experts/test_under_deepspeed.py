"""Experts on two ranks that use different ones, against one process that has the whole batch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.backbone.extended import ExtendedPreTrainedModel
from dga_scale.checkpoint.export import consolidate
from dga_scale.checkpoint.state import load_checkpoint
from dga_scale.checkpoint.store import newest_complete
from dga_scale.errors import UserError
from dga_scale.experts.extension import (
    add_experts,
    collect_features,
    sparse_sublayers,
    sublayer_ids,
    update_centres_every,
)
from dga_scale.launch.world import join_cluster
from dga_scale.zero.engine import partitioned_loading
from tests.helpers.ranks import run_ranks
from tests.helpers.small_experts import clusters_around
from tests.helpers.training import (
    LEARNING_RATE,
    MaskedLM,
    Setup,
    full_weights,
    global_batch,
    save,
    tiny_bert,
    tiny_engine,
    train_step,
)

STEPS = 4
EPSILON = 1e-3  # gradients that are 0 but for rounding (of biases of keys) stay small
Centres = dict[str, Tensor]


def model_with_experts(accumulation: int = 1) -> ExtendedPreTrainedModel:
    """Experts around three sequences of the first batch, two of them rank 0's; weights set apart."""
    dense = tiny_bert().eval()
    anatomy = anatomy_of(dense)
    sublayers = sublayer_ids(anatomy, 2, "both")
    ids, _ = global_batch(0)
    samples = collect_features(dense, anatomy, sublayers, [(ids, torch.ones_like(ids))], width=6, seed=0)
    clusters = {place: clusters_around(samples[place].features, (0, 1, 7)) for place in sublayers}
    model = add_experts(dense, clusters, samples, alpha=0.9).train()
    update_centres_every(model, accumulation)
    return model


def centres_of(model: ExtendedPreTrainedModel) -> Centres:
    return {str(place): s.router.centres.clone() for place, s in sparse_sublayers(model).items()}


def on_ranks(setup: Setup, folder: Path) -> tuple[dict[str, Tensor], Centres, list[bool], float, Centres]:
    """Train, save after half the steps, and resume from there in a new engine too."""
    cluster = join_cluster()
    engine = tiny_engine(setup, MaskedLM(model_with_experts(setup.accumulation)))
    idle = []
    for step in range(STEPS):
        if step == STEPS // 2:
            save(engine, folder, step)
        loss = train_step(engine, step)
        used = [set(s.last[1].tolist()) for s in sparse_sublayers(engine.module.lm).values()]
        idle += [len(experts) < 3 for experts in used]
    weights, centres = full_weights(engine), centres_of(engine.module.lm)
    engine.destroy()
    resumed = tiny_engine(setup, MaskedLM(model_with_experts(setup.accumulation)))
    checkpoint = newest_complete(folder)
    assert checkpoint is not None
    load_checkpoint(resumed, checkpoint, cluster)
    for step in range(STEPS // 2, STEPS):
        train_step(resumed, step)
    again = full_weights(resumed)
    assert all(torch.equal(again[name], weights[name]) for name in weights), "resumed otherwise"
    resumed_centres = centres_of(resumed.module.lm)
    resumed.destroy()
    return weights, centres, idle, loss, resumed_centres


def in_one_process() -> tuple[dict[str, Tensor], Centres]:
    model = MaskedLM(model_with_experts())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, eps=EPSILON)
    for step in range(STEPS):
        ids, labels = global_batch(step)
        model(ids, labels, 1 / int((labels != -100).sum())).backward()
        for parameter in model.parameters():
            if parameter.grad is None:  # an expert without a sequence: torch would skip its step
                parameter.grad = torch.zeros_like(parameter)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: parameter.detach() for name, parameter in model.lm.named_parameters()}
    return weights, centres_of(model.lm)


@pytest.fixture(scope="module")
def reference() -> tuple[dict[str, Tensor], Centres]:
    torch.manual_seed(0)
    return in_one_process()


@pytest.mark.parametrize(
    ("stage", "ranks", "accumulation"), [(0, 2, 1), (1, 2, 1), (2, 2, 2), (3, 2, 1), (3, 2, 2), (3, 1, 1)]
)
def test_every_stage_trains_what_one_process_trains(
    stage: int, ranks: int, accumulation: int, reference: tuple[dict[str, Tensor], Centres], tmp_path: Path
) -> None:
    results = run_ranks(ranks, on_ranks, Setup(stage, accumulation=accumulation, epsilon=EPSILON), tmp_path)
    expected, expected_centres = reference
    weights, centres, _, _, resumed = results[0]
    assert any(any(idle) for _, _, idle, _, _ in results), "every rank used every expert: shows nothing"
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=2e-6, msg=name)
    for place, tensor in expected_centres.items():
        torch.testing.assert_close(centres[place], tensor, rtol=1e-5, atol=1e-6)
        assert torch.equal(centres[place], results[-1][1][place]), "ranks differ"
        assert torch.equal(resumed[place], centres[place]), "resumed otherwise"


@pytest.mark.parametrize("stage", [2, 3])
def test_bf16_keeps_centres_in_fp32_and_the_model_comes_back(stage: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (_, centres, _, _, resumed), (_, others, _, _, _) = run_ranks(2, on_ranks, Setup(stage, "bf16"), run)
    for place, tensor in centres.items():
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, tensor.bfloat16().float())
        assert torch.equal(tensor, others[place])
        assert torch.equal(tensor, resumed[place])
    kept = consolidate(run, None, tmp_path / "model", dtype="bfloat16")
    model = AutoModelForMaskedLM.from_pretrained(kept)
    for sublayer in sparse_sublayers(model).values():
        router = sublayer.router
        assert router.centres.dtype == torch.float32
        assert not torch.equal(router.centres, router.centres.bfloat16().float())
        assert router.projection.abs().sum() > 0


def load_spread(folder: Path) -> str:
    """Load an extended model as a plain one is loaded under ZeRO-3; what is said against it."""
    with pytest.raises(UserError) as refused, partitioned_loading(Setup(3).resolved(2)):
        AutoModelForMaskedLM.from_pretrained(folder)
    return str(refused.value)


def test_loading_spread_over_ranks_is_refused(tmp_path: Path) -> None:
    model_with_experts().save_pretrained(tmp_path)
    for said in run_ranks(2, load_spread, tmp_path):
        assert "the extension 'experts' can't be loaded spread over the ranks of ZeRO-3" in said
