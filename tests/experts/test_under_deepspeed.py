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
from dga_scale.experts.usage import ExpertUsage
from dga_scale.launch.world import join_cluster
from dga_scale.zero.engine import Engine, partitioned_loading
from dga_scale.zero.optimizer_hooks import leave_idle
from dga_scale.zero.optimizers import optimizer_kind
from tests.helpers.ranks import run_ranks
from tests.helpers.small_experts import clusters_around
from tests.helpers.training import (
    LEARNING_RATE,
    MaskedLM,
    Setup,
    full_state,
    full_weights,
    global_batch,
    save,
    tiny_bert,
    tiny_engine,
    train_step,
)

STEPS = 4
EPSILON = 1e-3  # gradients that are 0 but for rounding (of biases of keys) stay small
WEIGHT_DECAY = 0.1
CENTRES = (0, 1, 7)
"""The sequences of the first batch that experts are made around."""
ALONE = {1: 1, 2: 7}
"""Steps whose sequences are all one, and that one's row in the first batch."""
MOMENTS = optimizer_kind("adamw").moments
Centres = dict[str, Tensor]


def batch_of(step: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    """The global batch of a step; in some all sequences are the one that an expert was made around."""
    ids, labels = global_batch(step, rows)
    if step not in ALONE:
        return ids, labels
    ids = global_batch(0)[0][ALONE[step]].expand(rows, -1)
    return ids, torch.where(labels == -100, -100, ids)


def model_with_experts(accumulation: int = 1) -> ExtendedPreTrainedModel:
    """Experts around three sequences of the first batch, two of them rank 0's; weights set apart."""
    dense = tiny_bert().eval()
    anatomy = anatomy_of(dense)
    sublayers = sublayer_ids(anatomy, 2, "both")
    ids, _ = global_batch(0)
    samples = collect_features(dense, anatomy, sublayers, [(ids, torch.ones_like(ids))], width=6, seed=0)
    clusters = {place: clusters_around(samples[place].features, CENTRES) for place in sublayers}
    model = add_experts(dense, clusters, samples, alpha=0.9).train()
    update_centres_every(model, accumulation)
    return model


def centres_of(model: ExtendedPreTrainedModel) -> Centres:
    return {str(place): s.router.centres.clone() for place, s in sparse_sublayers(model).items()}


def engine_of(setup: Setup) -> Engine:
    model = model_with_experts(setup.accumulation)
    engine = tiny_engine(setup, MaskedLM(model))
    leave_idle(engine, ExpertUsage(model, print).idle_parameters, MOMENTS)
    return engine


def state_of(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """Weights and moments of all ranks."""
    return {"weights": full_weights(engine)} | {name: full_state(engine, name) for name in MOMENTS}


def on_ranks(
    setup: Setup, folder: Path, idle_in: list[set[str]]
) -> tuple[dict[str, Tensor], Centres, list[bool], float, Centres]:
    """Train, save after half the steps, and resume from there in a new engine too."""
    cluster = join_cluster()
    engine = engine_of(setup)
    idle = []
    for step in range(STEPS):
        if step == STEPS // 2:
            save(engine, folder, step)
        before = state_of(engine) if step in ALONE else {}
        loss = train_step(engine, step, batch_of=batch_of)
        for what, after in state_of(engine).items() if before else ():
            same = {name for name in after if torch.equal(after[name], before[what][name])}
            assert same == idle_in[step], f"{what}: moved or not, {sorted(same ^ idle_in[step])}"
        used = [set(s.last[1].tolist()) for s in sparse_sublayers(engine.module.lm).values()]
        idle += [len(experts) < 3 for experts in used]
    weights, centres = full_weights(engine), centres_of(engine.module.lm)
    engine.destroy()
    resumed = engine_of(setup)
    checkpoint = newest_complete(folder)
    assert checkpoint is not None
    load_checkpoint(resumed, checkpoint, cluster)
    for step in range(STEPS // 2, STEPS):
        train_step(resumed, step, batch_of=batch_of)
    again = full_weights(resumed)
    assert all(torch.equal(again[name], weights[name]) for name in weights), "resumed otherwise"
    resumed_centres = centres_of(resumed.module.lm)
    resumed.destroy()
    return weights, centres, idle, loss, resumed_centres


def in_one_process() -> tuple[dict[str, Tensor], Centres, list[set[str]]]:
    """AdamW as it is written (Loshchilov and Hutter, 2019), a parameter at a time, idle experts left out.

    Returns weights, centres, and of each step the idle experts' parameters: no sequence gave them a gradient.
    """
    model = MaskedLM(model_with_experts())
    weights = dict(model.lm.named_parameters())
    mean, square = ({name: torch.zeros_like(weight) for name, weight in weights.items()} for _ in range(2))
    idle_in = []
    for step in range(STEPS):
        ids, labels = batch_of(step)
        model(ids, labels, 1 / int((labels != -100).sum())).backward()
        idle_in.append({name for name, weight in weights.items() if weight.grad is None})
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for name, weight in weights.items():
            if name in idle_in[step]:
                continue
            gradient = weight.grad
            decay = WEIGHT_DECAY if weight.dim() > 1 else 0.0
            mean[name] = 0.9 * mean[name] + 0.1 * gradient
            square[name] = 0.999 * square[name] + 0.001 * gradient**2
            update = mean[name] / (1 - 0.9 ** (step + 1))
            update /= (square[name] / (1 - 0.999 ** (step + 1))).sqrt() + EPSILON
            weight.data -= LEARNING_RATE * (decay * weight.data + update)
            weight.grad = None
    assert all(idle_in[step] - idle_in[0] for step in ALONE), "nothing idle has moments: shows nothing"
    return {name: weight.detach() for name, weight in weights.items()}, centres_of(model.lm), idle_in


@pytest.fixture(scope="module")
def reference() -> tuple[dict[str, Tensor], Centres, list[set[str]]]:
    torch.manual_seed(0)
    return in_one_process()


@pytest.mark.parametrize(
    ("stage", "ranks", "accumulation", "offload"),
    [
        (0, 2, 1, False), (0, 1, 1, False), (1, 2, 1, False), (2, 2, 2, False), (2, 2, 1, True),
        (3, 2, 1, False), (3, 2, 2, True), (3, 1, 1, False),
    ],
)  # fmt: skip
def test_every_stage_trains_what_one_process_trains(
    stage: int,
    ranks: int,
    accumulation: int,
    offload: bool,
    reference: tuple[dict[str, Tensor], Centres, list[set[str]]],
    tmp_path: Path,
) -> None:
    expected, expected_centres, idle_in = reference
    setup = Setup(
        stage, offload=offload, accumulation=accumulation, epsilon=EPSILON, weight_decay=WEIGHT_DECAY
    )
    results = run_ranks(ranks, on_ranks, setup, tmp_path, idle_in)
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
def test_bf16_keeps_centres_in_fp32_and_the_model_comes_back(
    stage: int, reference: tuple[dict[str, Tensor], Centres, list[set[str]]], tmp_path: Path
) -> None:
    run, setup = tmp_path / "run", Setup(stage, "bf16", weight_decay=WEIGHT_DECAY)
    results = run_ranks(2, on_ranks, setup, run, reference[2])
    (_, centres, _, _, resumed), (_, others, _, _, _) = results
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
