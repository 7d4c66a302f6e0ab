"""Held-out losses against a plain forward pass of the Hugging Face model, on one rank and on two."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForMaskedLM

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.corpus.loading.masking import IGNORED, MaskingPolicy
from dga_scale.corpus.loading.streams import EvalBatches
from dga_scale.corpus.sharding.pipeline import shard_corpus
from dga_scale.corpus.sharding.staging import ShardSettings
from dga_scale.corpus.shards import Corpus, open_corpus
from dga_scale.corpus.tokenizer import load_tokenizer
from dga_scale.errors import UserError
from dga_scale.evaluation.held_out import Evaluator, open_held_out
from dga_scale.objectives.methods import METHODS
from dga_scale.objectives.training_model import TrainingModel
from dga_scale.storage.checked_json import with_checksum
from tests.helpers.small import SmallWorld

ROWS = 30


def plain_rows(model: AutoModelForMaskedLM, corpus: Corpus) -> dict[int, tuple[float, int, int]]:
    """By row: sum of cross-entropies, labels and correct guesses, each row read alone."""
    masking = MaskingPolicy.for_corpus(corpus, 0.15)
    found = {}
    for batch in EvalBatches(corpus, masking, batch_size=1, rank=0, world_size=1, max_rows=ROWS):
        logits = model(batch.masked_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)
        real = batch.labels != IGNORED
        predicted, labels = logits[batch.positions[real]], batch.labels[real]
        loss = F.cross_entropy(predicted, labels, reduction="sum").item()
        found[int(batch.sample_ids)] = (loss, len(labels), int((predicted.argmax(-1) == labels).sum()))
    return found


@torch.no_grad()
def test_figures_and_batch_sums_are_those_of_plain_forward_passes(world: SmallWorld) -> None:
    corpus = open_held_out(str(world.corpus), load_tokenizer(world.model))
    assert corpus.path == world.corpus / "validation"
    lm = AutoModelForMaskedLM.from_pretrained(world.model).eval()
    rows = plain_rows(lm, corpus)
    loss, labels, correct = (sum(column) for column in zip(*rows.values(), strict=True))
    expected = {"text_loss": loss / labels, "text_accuracy": correct / labels}

    model = TrainingModel(lm, anatomy_of(lm), METHODS["mlm"](METHODS["mlm"].Settings())).train()
    masking = MaskingPolicy.for_corpus(corpus, 0.15)
    local: list[Tensor] = []

    def sum_over_ranks(tensor: Tensor) -> Tensor:
        local.append(tensor)
        return torch.stack(local).sum(dim=0)

    for ranks in (1, 2):
        local.clear()
        for rank in range(ranks):
            evaluator = Evaluator(
                {"text": corpus}, masking, batch_size=8, max_rows=ROWS, device=torch.device("cpu"),
                rank=rank, world_size=ranks, reduce=sum_over_ranks,
            )  # fmt: skip
            figures = evaluator.evaluate(model)
        assert figures == pytest.approx(expected, rel=1e-5)
    assert model.training, "the model is left in the mode that it had"

    evaluator = Evaluator({"text": corpus}, masking, batch_size=8, max_rows=ROWS, device=torch.device("cpu"))
    order = sorted(rows)
    chunks = [order[start : start + 8] for start in range(0, ROWS, 8)]
    of_batches = [[sum(rows[row][k] for row in chunk) for k in range(3)] for chunk in chunks]
    torch.testing.assert_close(
        evaluator.batch_sums(model, "text"), torch.tensor(of_batches, dtype=torch.float64), rtol=1e-5, atol=0
    )


def test_a_folder_that_holds_no_corpus_is_named_with_its_setting(world: SmallWorld) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        open_held_out(str(world.corpus / "nowhere"), load_tokenizer(world.model))


def test_text_without_a_token_to_predict(world: SmallWorld, tmp_path: Path) -> None:
    """Rows of unknown tokens only, of a corpus with others, and a corpus that has nothing else."""
    (tmp_path / "a.txt").write_text("".join(f"{'语' * n}\n" for n in range(1, 60)) + "the model learns " * 90)
    tokenizer = load_tokenizer(world.model)
    settings = ShardSettings(str(world.model), 32, "document", validation_share=0.0)
    shard_corpus([str(tmp_path / "a.txt")], tmp_path / "corpus", settings)
    corpus = open_corpus(tmp_path / "corpus", tokenizer)
    lm = AutoModelForMaskedLM.from_pretrained(world.model).eval()
    model = TrainingModel(lm, anatomy_of(lm), METHODS["mlm"](METHODS["mlm"].Settings()))
    evaluator = Evaluator.of_one_process(model, {"text": corpus}, batch_size=8, max_rows=3)
    with pytest.raises(
        UserError, match="none of the scored rows of the held-out text text has a token to predict"
    ):
        evaluator.evaluate(model)

    shards = [dataclasses.replace(shard, maskable=0) for shard in corpus.manifest.shards]
    manifest = dataclasses.replace(corpus.manifest, maskable=0, shards=shards)
    (corpus.path / "manifest.json").write_text(json.dumps(with_checksum(manifest.to_json())))
    with pytest.raises(
        UserError, match="corpus: none of its tokens can be predicted: all are special or unknown"
    ):
        open_corpus(corpus.path, tokenizer)
