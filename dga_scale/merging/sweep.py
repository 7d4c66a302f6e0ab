"""Score merged models without writing them: each coefficient's gain in the domain and cost outside."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from dga_scale.backbone.loading import load_model
from dga_scale.corpus.shards import Corpus, check_sequence_length
from dga_scale.evaluation.held_out import Evaluator
from dga_scale.merging.merge import Merge
from dga_scale.merging.settings import MergeSettings
from dga_scale.objectives.methods.mlm import MaskedLM
from dga_scale.objectives.training_model import TrainingModel


def sweep(
    merge: Merge,
    coefficients: Sequence[MergeSettings],
    corpora: Mapping[str, Corpus],
    *,
    batch_size: int = 16,
    max_rows: int | None = 2000,
) -> Iterator[dict[str, Any]]:
    """Merge in memory and score, one coefficient after another.

    Yields:
        The weight, and the loss and accuracy on each corpus by its name.
    """
    loaded = load_model(merge.models[0].name)
    for corpus in corpora.values():
        check_sequence_length(corpus.manifest, loaded.anatomy.max_positions)
    model = TrainingModel(loaded.model, loaded.anatomy, MaskedLM(MaskedLM.Settings()))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    evaluator = Evaluator.of_one_process(model, corpora, batch_size=batch_size, max_rows=max_rows)
    for settings in coefficients:
        merge.load_into(loaded.model, settings)
        yield {"weight": settings.weight, **evaluator.evaluate(model)}
