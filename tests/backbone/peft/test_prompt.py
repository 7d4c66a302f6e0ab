"""Soft prompts in every architecture: as if their embeddings were words, and only the text's states seen."""

import contextlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.backbone.extended import ExtendedPreTrainedModel, extend
from dga_scale.config.parsing import read_config
from dga_scale.errors import UserError
from dga_scale.objectives.methods import build_method
from tests.helpers.small_prompts import TOKENS, WORDS, with_prompt
from tests.helpers.tiny_models import TINY, VOCAB, batch

BATCH = batch()
BATCH["input_ids"] = BATCH["input_ids"].clamp(max=VOCAB - TOKENS - 1)


def spelled_out() -> dict[str, torch.Tensor]:
    rows = len(BATCH["input_ids"])
    ids = torch.cat([WORDS.expand(rows, -1), BATCH["input_ids"]], dim=1)
    mask = torch.cat([torch.ones(rows, TOKENS, dtype=torch.long), BATCH["attention_mask"]], dim=1)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_reads_the_prompt_as_words_before_the_text(name: str, tmp_path: Path) -> None:
    model = with_prompt(name)
    torch.manual_seed(0)
    plain = TINY[name].model()
    real = BATCH["attention_mask"].bool()
    with torch.no_grad():
        output = model(**BATCH, output_hidden_states=True)
        expected = plain(**spelled_out(), output_hidden_states=True)
    assert output.logits.shape == (*BATCH["input_ids"].shape, VOCAB)
    torch.testing.assert_close(output.logits[real], expected.logits[:, TOKENS:][real], rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours[real], theirs[:, TOKENS:][real], rtol=1e-4, atol=1e-5)
    assert anatomy_of(model).max_positions == anatomy_of(plain).max_positions - TOKENS
    model.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if TINY[name].causal else AutoModelForMaskedLM
    again = auto.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(again(**BATCH).logits, output.logits)


def classifier_of(name: str, folder: Path) -> ExtendedPreTrainedModel:
    with_prompt(name).save_pretrained(folder)
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, attn_implementation="eager"
    )


def test_a_pooler_reads_the_texts_first_token(tmp_path: Path) -> None:
    """BERT's, which is part of the trunk; token types may be given, as its tokenizer does."""
    classifier = classifier_of("bert", tmp_path)
    types = torch.zeros_like(BATCH["input_ids"])
    with torch.no_grad():
        states = classifier.base_model(**BATCH).last_hidden_state
        dense = classifier.base.bert.pooler.dense
        expected = classifier.base.classifier(torch.tanh(dense(states[:, 0])))
        assert torch.equal(classifier(**BATCH).logits, expected)
        assert torch.equal(classifier(**BATCH, token_type_ids=types).logits, expected)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_causal_classifier_reads_the_texts_last_token(name: str, tmp_path: Path) -> None:
    classifier = classifier_of(name, tmp_path)
    plain = AutoModelForSequenceClassification.from_config(
        classifier.base.config, attn_implementation="eager"
    )
    weights = classifier.base.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    with torch.no_grad():
        expected = plain.eval()(**spelled_out()).logits
        torch.testing.assert_close(classifier(**BATCH).logits, expected, rtol=1e-4, atol=1e-5)


def test_more_soft_tokens_than_positions_are_refused() -> None:
    with pytest.raises(UserError, match="--prompt_tokens"):
        extend(TINY["roberta"].model(), "prompt", {"tokens": 32})


def test_more_soft_tokens_than_positions_are_refused_before_a_run_is_made(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    flags = ["--ds_config", "x.json", "--model", str(tmp_path), "--corpus", "any", "--method", "prompt"]
    for tokens in (63, 64):
        config = read_config([*flags, "--prompt_tokens", str(tokens)])
        told = pytest.raises(UserError, match="--prompt_tokens 64: the model has 64 positions")
        with told if tokens == 64 else contextlib.nullcontext():
            build_method(config).check(config, causal=False)
