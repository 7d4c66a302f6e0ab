"""Sparse experts as an extension of a model: built from its config, or from a dense model's clusters."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dga_scale.backbone.anatomy import Anatomy, trunk_of
from dga_scale.backbone.extended import (
    ExtendedPreTrainedModel,
    Settings,
    extend,
    keep_no_cache,
    register_extension,
)
from dga_scale.config.declaration import Rule
from dga_scale.errors import UserError
from dga_scale.experts.clustering import Clusters
from dga_scale.experts.routing import ForwardState, Router, SparseSublayer, project
from dga_scale.experts.sublayers import SUBLAYERS, Sublayer, block_of, check_sublayers, sublayer_modules
from dga_scale.storage.typed_json import build

EXPERTS = "experts"
CHILD = "sparse"
"""The name of the child of a block that holds routers and copies."""


class SublayerId(NamedTuple):
    """A sublayer that gets experts."""

    layer: int
    sublayer: Sublayer

    def __str__(self) -> str:
        """Name the sublayer in messages and files."""
        return f"layer {self.layer} {self.sublayer}"


@dataclass(frozen=True)
class Sample:
    """The features that one sublayer has of a text sample."""

    features: Tensor
    """The features v' of each sequence, (N, d')."""
    projection: Tensor
    """The projection that they were computed with, (H, d')."""


def sublayer_ids(anatomy: Anatomy, layers: int, which: str) -> tuple[SublayerId, ...]:
    """List the sublayers that get experts: those of the last ``layers`` layers.

    Args:
        anatomy: The anatomy of the dense model.
        layers: The number of layers, counted from the top.
        which: The kind of sublayer: "attention", "ffn" or "both".

    Raises:
        UserError: ``layers`` is below 1, or above the number of the model's layers.
    """
    if not 1 <= layers <= anatomy.num_layers:
        raise UserError(
            f"--cse_layers {layers}: the model has {anatomy.num_layers} layers; give 1 to that many"
        )
    kinds = SUBLAYERS if which == "both" else tuple(kind for kind in SUBLAYERS if kind == which)
    check_sublayers(anatomy, kinds)
    return tuple(
        SublayerId(layer, kind)
        for layer in range(anatomy.num_layers - layers, anatomy.num_layers)
        for kind in kinds
    )


@torch.no_grad()
def collect_features(
    lm: PreTrainedModel,
    anatomy: Anatomy,
    sublayers: Sequence[SublayerId],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    width: int,
    seed: int,
) -> dict[SublayerId, Sample]:
    """Run the dense model on this rank's batches, and collect v' = mean_t(input) P at every sublayer.

    P (H, width) is Gaussian with variance 1/width, the same on all ranks. Dropout is off meanwhile.

    Args:
        lm: The whole dense model.
        anatomy: The anatomy of the model.
        sublayers: The sublayers at which to collect.
        batches: Ids and attention mask of each batch, (B, T) each, on the model's device.
        width: The width d' of the features.
        seed: The seed of the projections.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    device = next(lm.parameters()).device
    found: dict[SublayerId, list[Tensor]] = {sublayer: [] for sublayer in sublayers}
    projections = {
        sublayer: (torch.randn(anatomy.hidden_size, width, generator=generator) / width**0.5).to(device)
        for sublayer in sublayers
    }
    mask: Tensor | None = None

    def collector(sublayer: SublayerId) -> Callable[..., None]:
        def collect(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            found[sublayer].append(project(states, mask, projections[sublayer]).cpu())

        return collect

    hooks = []
    for sublayer in sublayers:
        first = lm.get_submodule(sublayer_modules(anatomy, *sublayer)[0])
        hooks.append(first.register_forward_pre_hook(collector(sublayer), with_kwargs=True))
    training, trunk = lm.training, anatomy.trunk(lm)
    lm.eval()
    try:
        for ids, mask in batches:
            trunk(input_ids=ids, attention_mask=mask)
    finally:
        for hook in hooks:
            hook.remove()
        lm.train(training)
    empty = [torch.zeros(0, width)]
    return {
        sublayer: Sample(torch.cat(found[sublayer] or empty), projections[sublayer].cpu())
        for sublayer in sublayers
    }


class ExpertSublayer(NamedTuple):
    """A sublayer that has experts."""

    layer: int
    sublayer: Sublayer
    experts: Annotated[int, Rule(lambda count: 1 <= count < 2**16, "from 1 to 65535")]


class ExpertSettings(NamedTuple):
    """The extension's settings, as they stand in ``config.json`` and the run's folder."""

    alpha: float
    projection: Annotated[int, Rule(lambda width: 1 <= width < 2**31, "at least 1")]
    sublayers: list[ExpertSublayer]


def settings_of(clusters: dict[SublayerId, Clusters], *, alpha: float, width: int) -> Settings:
    """Describe the experts as JSON data for ``config.json`` and the run's folder."""
    sublayers = [
        {"layer": sublayer.layer, "sublayer": sublayer.sublayer, "experts": len(found.centres)}
        for sublayer, found in clusters.items()
    ]
    return {"alpha": alpha, "projection": width, "sublayers": sublayers}


def add_experts(
    dense: PreTrainedModel,
    clusters: dict[SublayerId, Clusters],
    samples: dict[SublayerId, Sample],
    *,
    alpha: float,
) -> ExtendedPreTrainedModel:
    """Add one expert for each cluster to a dense model, whose output does not change but for rounding.

    Raises:
        UserError: As ``extend``.
    """
    width = next(iter(samples.values())).features.shape[1]
    model = extend(dense, EXPERTS, settings_of(clusters, alpha=alpha, width=width))
    for sublayer, sparse in sparse_sublayers(model).items():
        router = sparse.router
        router.projection.copy_(samples[sublayer].projection)
        router.centres.copy_(torch.from_numpy(clusters[sublayer].centres))
        router.radii.copy_(torch.from_numpy(clusters[sublayer].radii))
    return model


def sparse_sublayers(model: ExtendedPreTrainedModel) -> dict[SublayerId, SparseSublayer]:
    """Return the sublayers of a model that have experts."""
    found = {}
    for entry in model.config.extension_settings["sublayers"]:
        sublayer = SublayerId(entry["layer"], entry["sublayer"])
        block = block_of(model.anatomy, sublayer.layer)
        sparse = model.get_submodule(f"{block}{CHILD}.{sublayer.sublayer}")
        assert isinstance(sparse, SparseSublayer)
        found[sublayer] = sparse
    return found


def expert_parameters(model: ExtendedPreTrainedModel) -> dict[SublayerId, list[frozenset[str]]]:
    """Name the parameters of each expert of each sublayer, as in ``named_parameters()``."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        sublayer: [
            frozenset(names[p] for module in sparse.expert(index) for p in module.parameters())
            for index in range(len(sparse.router.centres))
        ]
        for sublayer, sparse in sparse_sublayers(model).items()
    }


def update_centres_every(model: ExtendedPreTrainedModel, forwards: int) -> None:
    """Update the centres once in ``forwards`` training forward passes: those of one optimizer step.

    The centres then depend on the step's sequences alone, not on how these are cut into micro-batches.
    """
    for sublayer in sparse_sublayers(model).values():
        sublayer.state.per_update = forwards


def _apply(base: PreTrainedModel, anatomy: Anatomy, settings: Settings) -> Anatomy:
    """Add routers and copies of the dense sublayers: weights are equal, centres are set or loaded later."""
    if any(hasattr(parameter, "ds_id") for parameter in base.parameters()):
        raise UserError(
            "experts are copies of whole sublayers, and ZeRO-3 has partitioned the model already: load it "
            "before transformers' ZeRO-3 integration is active"
        )
    try:
        structure: ExpertSettings = build(ExpertSettings, settings, "extension_settings")
        for entry in structure.sublayers:
            if entry.layer >= anatomy.num_layers:
                raise ValueError(f"layer {entry.layer} is none of the model's {anatomy.num_layers}")
    except ValueError as error:
        raise UserError(f"the model's experts can't be built: {error}. Restore its config.json") from error
    keep_no_cache(base, "experts")  # a route is chosen for a whole sequence, not for its next token
    state = ForwardState(trunk_of(base))
    for entry in structure.sublayers:
        layer, sublayer = entry.layer, entry.sublayer
        block = block_of(anatomy, layer)
        names = sublayer_modules(anatomy, layer, sublayer)
        dense = [base.get_submodule(name) for name in names]
        router = Router(anatomy.hidden_size, structure.projection, entry.experts, structure.alpha).to(
            base.device
        )
        sparse = SparseSublayer([name.removeprefix(block) for name in names], dense, router, state)
        state.sublayers.append(sparse)
        parent = base.get_submodule(block.removesuffix("."))
        if not hasattr(parent, CHILD):
            parent.add_module(CHILD, nn.ModuleDict())
        parent.get_submodule(CHILD).add_module(sublayer, sparse)
    base._keep_in_fp32_modules_strict = {*(base._keep_in_fp32_modules_strict or ()), "router"}
    return dataclasses.replace(anatomy, first_position=None)  # packed rows would share a route


register_extension(EXPERTS, _apply)
