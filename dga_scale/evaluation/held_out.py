"""Held-out losses of a language model: during a run, of merged models and in the comparison of models.

A room of its own, above the objectives and below training, merging and end tasks, which all score models
with the same rows and masks.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dga_scale.corpus.loading.batches import Batch
from dga_scale.corpus.loading.masking import MaskingPolicy
from dga_scale.corpus.loading.streams import EvalBatches
from dga_scale.corpus.shards import VALIDATION, Corpus, open_corpus
from dga_scale.errors import UserError
from dga_scale.objectives.training_model import TrainingModel, evaluate_rows
from dga_scale.preservation.fragments import Reduce

MASK_PROBABILITY = 0.15
"""The share of tokens that are masked where no run's settings give another."""


def open_held_out(path: str, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """Open a corpus's held-out part, or the whole corpus where it has none.

    Args:
        path: The corpus's folder.
        tokenizer: The tokenizer of the models that are evaluated.

    Raises:
        UserError: There is no corpus, or it is one of another tokenizer.

    """
    folder = Path(path)
    return open_corpus(folder / VALIDATION if (folder / VALIDATION).is_dir() else folder, tokenizer)


class Evaluator:
    """An evaluator of language models on held-out corpora, always on the same rows and masks.

    Args:
        corpora: The corpora that are scored, by name.
        masking: The masking policy; None for a causal model, which predicts every next token.
        batch_size: The number of rows in one forward pass of one rank.
        max_rows: The most rows of each corpus that are scored, a fixed sample; None: all.
        device: The device that the model is on.
        rank, world_size: The rank and the number of ranks; each scores its share of the rows.
        reduce: The function that sums over ranks.
        autocast: The dtype of ``torch.autocast`` in forward passes; None: the model computes in its own.

    """

    def __init__(
        self,
        corpora: Mapping[str, Corpus],
        masking: MaskingPolicy | None,
        *,
        batch_size: int,
        max_rows: int | None,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        reduce: Reduce = lambda tensor: tensor,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.corpora = dict(corpora)
        self.max_rows = max_rows
        self._masking = masking
        self._batch_size = batch_size
        self._device = device
        self._rank, self._world_size = rank, world_size
        self._reduce = reduce
        self._autocast = autocast

    @classmethod
    def of_one_process(
        cls,
        model: TrainingModel,
        corpora: Mapping[str, Corpus],
        *,
        batch_size: int,
        max_rows: int | None,
    ) -> "Evaluator":
        """Make an evaluator for a model that no run trains: in this process alone, in bf16 autocast.

        Rows and masks are those of a training run's evaluation with the same ``max_rows``.
        """
        masked = not model.anatomy.causal and bool(corpora)
        return cls(
            corpora,
            MaskingPolicy.for_corpus(next(iter(corpora.values())), MASK_PROBABILITY) if masked else None,
            batch_size=batch_size,
            max_rows=max_rows,
            device=model.lm.device,
            autocast=torch.bfloat16,
        )

    def evaluate(self, model: TrainingModel) -> dict[str, float]:
        """Score a model; every rank has to call it.

        Args:
            model: The model, which is put into eval mode meanwhile. DeepSpeed: ``engine.module``.

        Returns:
            ``NAME_loss`` (nats a predicted token) and ``NAME_accuracy`` of each corpus.

        Raises:
            UserError: On every rank, for text without a token to predict.

        """
        figures = {}
        for name in self.corpora:
            sums = torch.zeros(3, dtype=torch.float64, device=self._device)
            for _, of_rows in self._scored(model, self._batches(name)):
                sums += of_rows.sum(dim=0)
            loss, labels, correct = self._reduce(sums).tolist()
            if not labels:
                raise UserError(
                    f"none of the scored rows of the held-out text {name} has a token to predict: all are "
                    "special or unknown. Score more rows, or other text"
                )
            figures[f"{name}_loss"], figures[f"{name}_accuracy"] = loss / labels, correct / labels
        return figures

    def batch_sums(self, model: TrainingModel, name: str) -> Tensor:
        """Sum losses, labels and correct guesses on one corpus, by batches of neighbouring rows.

        Each sum is over ``batch_size`` rows that stand one after the other in the corpus, though they are
        scored sorted by length: sums over rows of like lengths would not be draws of one kind.

        Returns:
            (batches, 3) fp64, on the CPU.

        """
        assert self._world_size == 1, "the batches of several ranks are not gathered"
        batches = self._batches(name)
        sums = torch.zeros(len(batches), 3, dtype=torch.float64)
        for batch, of_rows in self._scored(model, batches):
            real = batch.sample_ids >= 0
            numbers = np.searchsorted(batches.rows, batch.sample_ids[real].numpy()) // self._batch_size
            sums.index_add_(0, torch.from_numpy(numbers), of_rows.cpu()[real])
        return sums

    def _batches(self, name: str) -> EvalBatches:
        return EvalBatches(
            self.corpora[name],
            self._masking,
            batch_size=self._batch_size,
            rank=self._rank,
            world_size=self._world_size,
            max_rows=self.max_rows,
        )

    def _scored(self, model: TrainingModel, batches: EvalBatches) -> Iterator[tuple[Batch, Tensor]]:
        """Yield each batch with its rows' sums (B, 3) on the device: loss, labels, correct guesses."""
        for batch in batches:
            with torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None):
                of_rows = evaluate_rows(model, batch.to(self._device))
            yield batch, of_rows
