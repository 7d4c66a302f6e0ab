"""Merged models scored without writing them: what each coefficient gains in the domain and costs outside."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dga_scale.backbone.loading import load_model
from dga_scale.corpus.loading.batches import EvalBatches
from dga_scale.corpus.loading.masking import MaskingPolicy
from dga_scale.corpus.shards import VALIDATION, Corpus, check_matches, check_sequence_length
from dga_scale.errors import UserError
from dga_scale.merging.formulas import MergeSettings
from dga_scale.merging.merge import Merge
from dga_scale.objectives.methods.mlm import MaskedLM
from dga_scale.objectives.training_model import TrainingModel, evaluate_rows
from dga_scale.train.batches import to_device

MASK_PROBABILITY = 0.15


def held_out(path: str, setting: str, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """Open a corpus's held-out part, or the whole corpus where it has none.

    Raises:
        UserError: no corpus there, or one of another tokenizer.

    """
    folder = Path(path)
    try:
        corpus = Corpus.open(folder / VALIDATION if (folder / VALIDATION).is_dir() else folder)
        check_matches(corpus.manifest, tokenizer)
    except UserError as error:
        raise UserError(f"{setting} {error}") from None
    return corpus


def lm_figures(
    model: TrainingModel, corpora: Mapping[str, Corpus], *, batch_size: int, max_rows: int | None
) -> dict[str, float]:
    """Loss (nats a predicted token) and accuracy on each corpus, in one process, in bf16 autocast.

    Rows and masks are those of a training run's evaluation with the same ``max_rows``.
    """
    figures = {}
    for name, corpus in corpora.items():
        sums = batch_sums(model, corpus, batch_size=batch_size, max_rows=max_rows)
        loss, count, correct = sums.sum(dim=0).tolist()
        figures[f"{name}_loss"], figures[f"{name}_accuracy"] = loss / count, correct / count
    return figures


def batch_sums(model: TrainingModel, corpus: Corpus, *, batch_size: int, max_rows: int | None) -> Tensor:
    """Sums of losses, labels and correct guesses: (n, 3) fp64, on the CPU.

    Each is over ``batch_size`` rows that stand one after the other in the corpus, though they are read sorted
    by length: sums over rows of like lengths would not be draws of one kind.
    """
    device = model.lm.device
    masking = None if model.anatomy.causal else MaskingPolicy.for_corpus(corpus, MASK_PROBABILITY)
    batches = EvalBatches(corpus, masking, batch_size=batch_size, rank=0, world_size=1, max_rows=max_rows)
    sums = torch.zeros(len(batches), 3, dtype=torch.float64)
    with torch.autocast(device.type, torch.bfloat16):
        for batch in batches:
            real = batch.sample_ids >= 0
            places = np.searchsorted(batches.rows, batch.sample_ids[real].numpy()) // batch_size
            of_rows = evaluate_rows(model, to_device(batch, device)).cpu()
            sums.index_add_(0, torch.from_numpy(places), of_rows[real])
    return sums


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
        weight, and loss and accuracy of each corpus by its name.

    """
    loaded = load_model(merge.models[0].name)
    for corpus in corpora.values():
        check_sequence_length(corpus.manifest, loaded.anatomy.max_positions)
    model = TrainingModel(loaded.model, loaded.anatomy, MaskedLM(MaskedLM.Settings()))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    for settings in coefficients:
        merge.load_into(loaded.model, settings)
        figures = lm_figures(model, corpora, batch_size=batch_size, max_rows=max_rows)
        yield {"weight": settings.weight, **figures}
