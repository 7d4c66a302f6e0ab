"""What the tests of the comparison methods share: models with a teacher, and plain forward passes."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.config.settings import (
    DataSettings,
    ModelSettings,
    OptimizationSettings,
    RunSettings,
    TrainConfig,
)
from dga_scale.corpus.loading.batches import Batch, Counts
from dga_scale.corpus.loading.masking import IGNORED
from dga_scale.objectives.method import Method, MethodContext
from dga_scale.objectives.methods import METHODS
from dga_scale.objectives.training_model import TrainingModel
from tests.helpers.batches import batch_of, counts_of, dense_labels
from tests.helpers.toy import PAD, toy_lm


def config_of(name: str, **settings: Any) -> TrainConfig:
    """Settings of a run with a method; names of the method's own or of the optimization's."""
    own = METHODS[name].Settings()
    optimization = {f.name for f in dataclasses.fields(OptimizationSettings)} & settings.keys()
    method = {key: value for key, value in settings.items() if key not in optimization}
    return TrainConfig(
        ModelSettings(model="toy"),
        DataSettings(),
        dataclasses.replace(own, **method),
        OptimizationSettings(**{key: settings[key] for key in optimization}),
        RunSettings(),
    )


def method_context(lm: PreTrainedModel, config: TrainConfig) -> MethodContext:
    """One process without a corpus."""
    return MethodContext(
        lm=lm,
        anatomy=anatomy_of(lm),
        config=config,
        folder=Path(),
        resuming=False,
        device=torch.device("cpu"),
        sample=lambda rows: iter(()),
        sum=lambda tensor: tensor,
        all_gather_object=lambda thing: [thing],
        run_on_first=lambda work: work(),
        print=print,
    )


def method_of(name: str, **settings: Any) -> Method:
    return METHODS[name](config_of(name, **settings).method)


def training_model(
    name: str,
    lm: PreTrainedModel | None = None,
    *,
    teacher_seed: int = 1,
    prepared: bool = True,
    **settings: Any,
) -> TrainingModel:
    """A method on a model (a toy without dropout), with a toy of ``teacher_seed`` as its teacher."""
    lm = toy_lm() if lm is None else lm
    method = method_of(name, **settings)
    if prepared:
        lm = method.prepare(method_context(lm, config_of(name, **settings))) or lm
    teacher = toy_lm(seed=teacher_seed) if method.needs_teacher else None
    return TrainingModel(lm, anatomy_of(lm), method, teacher=teacher).train(lm.training)


def loss_of(
    model: TrainingModel, batch: Batch, counts: Counts | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The training loss, where the global batch has these counts (default: this batch is all of it)."""
    return model(batch, counts or counts_of(batch))


def states_of(lm: PreTrainedModel, batch: Batch, masked: bool) -> list[Tensor]:
    """Last hidden states (tokens of the row, H) of each row on its own, without padding."""
    ids = batch.masked_ids if masked else batch.input_ids
    lengths = batch.attention_mask.sum(dim=1).tolist()
    return [lm.base_model(ids[None, row, :n]).last_hidden_state[0] for row, n in enumerate(lengths)]


def info_nce(anchors: list[Tensor], keys: list[Tensor], temperature: float) -> Tensor:
    """Mean of -log e^{cos(a_i, k_i)/tau} / sum_j e^{cos(a_i, k_j)/tau}, as written; fp64."""

    def similarity(a: Tensor, b: Tensor) -> Tensor:
        a, b = a.double(), b.double()
        return torch.exp(torch.dot(a, b) / (a.norm() * b.norm()) / temperature)

    losses = [
        -torch.log(similarity(anchor, keys[i]) / sum(similarity(anchor, key) for key in keys))
        for i, anchor in enumerate(anchors)
    ]
    return torch.stack(losses).mean()


def gradients_of(lm: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=5e-6 * largest, msg=name)


def wider(batch: Batch, columns: int) -> Batch:
    """The same batch with more padding."""

    def padded(tensor: Tensor, value: int) -> Tensor:
        return torch.cat([tensor, tensor.new_full((len(tensor), columns), value)], dim=1)

    return batch_of(
        padded(batch.input_ids, PAD),
        padded(batch.masked_ids, PAD),
        padded(batch.attention_mask, 0),
        padded(dense_labels(batch), IGNORED),
        sources=batch.sources,
    )


def assert_gradients_of_mlm_and(term: torch.nn.Module, trained: torch.nn.Module, batch: Batch) -> None:
    """The gradients of ``trained`` are those of plain MLM and of ``term``'s own backward pass added up."""
    mlm = training_model("mlm")
    loss_of(mlm, batch)[0].backward()
    plain, added = gradients_of(mlm.lm), gradients_of(term)
    assert_same_gradients(gradients_of(trained), {name: plain[name] + added.get(name, 0) for name in plain})
