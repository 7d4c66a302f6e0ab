"""Sparse experts as an extension of a model: built from its config, or out of a dense model's clusters."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dga_scale.backbone.anatomy import Anatomy
from dga_scale.backbone.extended import (
    ExtendedConfig,
    ExtendedPreTrainedModel,
    Settings,
    extend,
    keep_no_cache,
    register_extension,
)
from dga_scale.errors import UserError
from dga_scale.experts.clustering import Clusters
from dga_scale.experts.routing import Passes, Router, SparseSublayer, project
from dga_scale.experts.sublayers import SUBLAYERS, Sublayer, block_of, sublayer_modules

EXPERTS = "experts"
CHILD = "sparse"
"""Child of a block that holds routers and copies."""


class Place(NamedTuple):
    """A sublayer that gets experts."""

    layer: int
    sublayer: Sublayer

    def __str__(self) -> str:
        """Name the place in messages and files."""
        return f"layer {self.layer} {self.sublayer}"


@dataclass(frozen=True)
class Sample:
    """What a pass over text collected at one place."""

    features: Tensor
    """(N, d') v' of each sequence."""
    projection: Tensor
    """(H, d') that they were made with."""


def places_of(anatomy: Anatomy, layers: int, which: str) -> tuple[Place, ...]:
    """List the sublayers that get experts: those of the last ``layers`` layers.

    Args:
        anatomy: of the dense model.
        layers: how many.
        which: "attention", "ffn" or "both".

    Raises:
        UserError: more layers than the model has, or none.

    """
    if not 1 <= layers <= anatomy.num_layers:
        raise UserError(
            f"--cse_layers {layers}: the model has {anatomy.num_layers} layers; give 1 to that many"
        )
    kinds = SUBLAYERS if which == "both" else tuple(kind for kind in SUBLAYERS if kind == which)
    return tuple(
        Place(layer, kind)
        for layer in range(anatomy.num_layers - layers, anatomy.num_layers)
        for kind in kinds
    )


@torch.no_grad()
def collect_features(
    lm: PreTrainedModel,
    anatomy: Anatomy,
    places: Sequence[Place],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    width: int,
    seed: int,
) -> dict[Place, Sample]:
    """Run the dense model on this rank's batches; v' = mean_t(input) P of every sequence, at every place.

    P (H, width) is Gaussian with variance 1/width, the same on all ranks. Dropout is off meanwhile.

    Args:
        lm: the whole dense model.
        anatomy: its anatomy.
        places: where to collect.
        batches: ids and attention mask (B, T) each, on the model's device.
        width: d'.
        seed: of the projections.

    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    device = next(lm.parameters()).device
    found: dict[Place, list[Tensor]] = {place: [] for place in places}
    projections = {
        place: (torch.randn(anatomy.hidden_size, width, generator=generator) / width**0.5).to(device)
        for place in places
    }
    mask: Tensor | None = None

    def collector(place: Place) -> Callable[..., None]:
        def collect(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            found[place].append(project(states, mask, projections[place]).cpu())

        return collect

    hooks = []
    for place in places:
        first = lm.get_submodule(sublayer_modules(anatomy, *place)[0])
        hooks.append(first.register_forward_pre_hook(collector(place), with_kwargs=True))
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
    return {place: Sample(torch.cat(found[place] or empty), projections[place].cpu()) for place in places}


def settings_of(clusters: dict[Place, Clusters], *, alpha: float, width: int) -> Settings:
    """Describe the experts as JSON data: what ``config.json`` and the run's folder hold."""
    sublayers = [
        {"layer": place.layer, "sublayer": place.sublayer, "experts": len(found.centres)}
        for place, found in clusters.items()
    ]
    return {"alpha": alpha, "projection": width, "sublayers": sublayers}


def add_experts(
    dense: PreTrainedModel, clusters: dict[Place, Clusters], samples: dict[Place, Sample], *, alpha: float
) -> ExtendedPreTrainedModel:
    """Give a dense model one expert a cluster; its output stays what it was, up to rounding.

    Raises:
        UserError: as ``extend``.

    """
    width = next(iter(samples.values())).features.shape[1]
    model = extend(dense, EXPERTS, settings_of(clusters, alpha=alpha, width=width))
    for place, sublayer in sparse_sublayers(model).items():
        router = sublayer.router
        router.projection.copy_(samples[place].projection)
        router.centres.copy_(torch.from_numpy(clusters[place].centres))
        router.radii.copy_(torch.from_numpy(clusters[place].radii))
    return model


def has_experts(model: PreTrainedModel) -> bool:
    """Whether sequences go to experts in a model."""
    return isinstance(model.config, ExtendedConfig) and model.config.extension == EXPERTS


def sparse_sublayers(model: ExtendedPreTrainedModel) -> dict[Place, SparseSublayer]:
    """Find the sublayers with experts of a model."""
    found = {}
    for entry in model.config.extension_settings["sublayers"]:
        place = Place(entry["layer"], entry["sublayer"])
        block = block_of(model.anatomy, place.layer)
        sublayer = model.get_submodule(f"{block}{CHILD}.{place.sublayer}")
        assert isinstance(sublayer, SparseSublayer)
        found[place] = sublayer
    return found


def update_centres_every(model: ExtendedPreTrainedModel, passes: int) -> None:
    """Let the centres move once in so many training passes: those of one optimizer step.

    They then depend on the step's sequences alone, not on how those are cut into passes.
    """
    for sublayer in sparse_sublayers(model).values():
        sublayer.passes.per_update = passes


def _apply(base: PreTrainedModel, anatomy: Anatomy, settings: Settings) -> Anatomy:
    """Add routers and copies of the dense sublayers; equal weights, centres still to be set or loaded."""
    if any(hasattr(parameter, "ds_id") for parameter in base.parameters()):
        raise UserError(
            "experts are copies of whole sublayers, and ZeRO-3 has spread the model over the ranks already: "
            "load it before transformers is told of ZeRO-3"
        )
    keep_no_cache(base, "experts")  # a route is chosen for a whole sequence, not for its next token
    passes = Passes(base.base_model)
    for entry in settings["sublayers"]:
        layer, sublayer = entry["layer"], entry["sublayer"]
        block = block_of(anatomy, layer)
        names = sublayer_modules(anatomy, layer, sublayer)
        dense = [base.get_submodule(name) for name in names]
        router = Router(anatomy.hidden_size, settings["projection"], entry["experts"], settings["alpha"]).to(
            base.device
        )
        sparse = SparseSublayer([name.removeprefix(block) for name in names], dense, router, passes)
        passes.sublayers.append(sparse)
        home = base.get_submodule(block.removesuffix("."))
        if not hasattr(home, CHILD):
            home.add_module(CHILD, nn.ModuleDict())
        home.get_submodule(CHILD).add_module(sublayer, sparse)
    base._keep_in_fp32_modules_strict = {*(base._keep_in_fp32_modules_strict or ()), "router"}
    return dataclasses.replace(anatomy, first_position=None)  # and rows read as one would go one way


register_extension(EXPERTS, _apply)
