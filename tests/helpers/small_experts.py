"""Small models with experts, for the tests of this room."""

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.backbone.extended import ExtendedPreTrainedModel
from dga_scale.experts.clustering import Clusters
from dga_scale.experts.extension import add_experts, collect_features, sparse_sublayers, sublayer_ids
from dga_scale.experts.routing import SparseSublayer
from tests.helpers.tiny_models import batch

ROWS = batch(rows=8)
ALPHA = 0.9


def clusters_around(features: Tensor, rows: tuple[int, ...]) -> Clusters:
    """Clusters with centres at some of the sequences: those go there."""
    return Clusters(
        centres=features[list(rows)].numpy(),
        radii=np.linspace(1.0, 1.1, len(rows)).astype(np.float32),
        labels=np.zeros(len(features), dtype=np.int64),
        noise=0,
        eps=1.0,
        min_samples=5,
    )


def with_experts(
    dense: PreTrainedModel, which: str = "both", *, layers: int = 1, rows: tuple[int, ...] = (0, 3, 7)
) -> ExtendedPreTrainedModel:
    """Extend ``dense`` in place, with an expert for each of some sequences of ``ROWS``."""
    anatomy = anatomy_of(dense)
    sublayers = sublayer_ids(anatomy, layers, which)
    text = [(ROWS["input_ids"], ROWS["attention_mask"])]
    samples = collect_features(dense, anatomy, sublayers, text, width=6, seed=0)
    clusters = {place: clusters_around(samples[place].features, rows) for place in sublayers}
    return add_experts(dense, clusters, samples, alpha=ALPHA)


def only(model: ExtendedPreTrainedModel) -> SparseSublayer:
    """Return the one sublayer with experts."""
    (sublayer,) = sparse_sublayers(model).values()
    return sublayer


def move_apart(model: ExtendedPreTrainedModel) -> None:
    """Give every copy weights of its own."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for sublayer in sparse_sublayers(model).values():
            for parameter in sublayer.experts.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
