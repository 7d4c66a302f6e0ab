"""Fine-tuning: a tiny model learns a tiny task, and does so again the same way."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from dga_scale.backbone.anatomy import Anatomy, anatomy_of
from dga_scale.backbone.extended import extend, register_extension
from dga_scale.backbone.loading import load_model_config
from dga_scale.corpus.tokenizer import load_tokenizer
from dga_scale.endtasks.finetune import _positions, encode, finetune, load_classifier, predict, score
from dga_scale.endtasks.metrics import classification_scores, regression_scores
from dga_scale.endtasks.recipes import Recipe
from dga_scale.endtasks.tasks import Example, Task, load_task
from dga_scale.errors import UserError
from tests.helpers.tiny_corpora import byte_bpe, wordpiece
from tests.helpers.tiny_models import SIZES, TINY
from tests.helpers.tiny_tasks import tiny_model, write_split, write_task

QUICK = Recipe(epochs=8, learning_rate=5e-3, metric="accuracy")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return load_task(write_task(tmp_path_factory.mktemp("tasks") / "words"))


def test_a_separable_task_is_learnt_and_the_seed_decides_all(model: str, task: Task):
    losses: list[list[float]] = []
    results = []
    for seed in (1, 1, 2):
        losses.append([])
        results.append(
            finetune(model, task, QUICK, seed, on_epoch=lambda _, loss, __: losses[-1].append(loss))
        )
        results[-1].pop("seconds")
    assert results[0]["scores"]["accuracy"] > 0.9
    assert (results[0]["epoch"], results[0]["dev_scores"]) == (QUICK.epochs, [])
    assert results[0] == results[1]
    assert losses[0] == losses[1] != losses[2]
    assert losses[0][-1] < 0.5 * losses[0][0]


def test_dev_chooses_the_epoch_and_stops(model: str, task: Task):
    """A learning rate of next to nothing: no epoch beats the first, so training ends ``patience`` later."""
    with_dev = dataclasses.replace(task, dev=task.test[:8])
    still = dataclasses.replace(QUICK, learning_rate=1e-12, epochs=9, patience=2)
    result = finetune(model, with_dev, still, 1)
    assert (result["epoch"], len(result["dev_scores"])) == (1, 3)
    learning = finetune(model, with_dev, QUICK, 1)
    assert learning["dev_scores"][learning["epoch"] - 1] == max(learning["dev_scores"])


def test_the_weights_of_the_chosen_epoch_are_scored(model: str, task: Task, monkeypatch: pytest.MonkeyPatch):
    """Dev is made to say that the first epoch was best: its weights, not the last ones, predict test."""
    seen = []
    told = iter([0.9, 0.1, 0.1])

    def watched(classifier, data, task, recipe):
        weights = next(classifier.parameters()).detach().clone()
        seen.append(weights)
        return {"accuracy": next(told, 0.5)}

    def watched_at_last(classifier, data, task, recipe):
        seen.append(next(classifier.parameters()).detach().clone())
        return predict(classifier, data, task, recipe)

    monkeypatch.setattr("dga_scale.endtasks.finetune.score", watched)
    monkeypatch.setattr("dga_scale.endtasks.finetune.predict", watched_at_last)
    recipe = dataclasses.replace(QUICK, epochs=3)
    finetune(model, dataclasses.replace(task, dev=task.test[:8]), recipe, 1)
    assert len(seen) == 4  # three times dev, once test
    assert torch.equal(seen[3], seen[0])
    assert not torch.equal(seen[2], seen[0])


def test_padding_and_the_filled_up_batch_change_no_score(
    model: str, task: Task, monkeypatch: pytest.MonkeyPatch
):
    """Against the model called on one text at a time, unpadded."""
    monkeypatch.setattr("dga_scale.endtasks.finetune.LENGTH_STEP", 4)
    tokenizer = load_tokenizer(model)
    fp32 = dataclasses.replace(QUICK, precision="fp32", batch_size=5)
    torch.manual_seed(0)
    classifier = load_classifier(model, task, tokenizer).eval()
    data = encode(tokenizer, task.test, task, fp32, 16, CPU)
    assert data.input_ids.shape == (24, 16)
    with torch.no_grad():
        logits = torch.cat([classifier(**tokenizer(e.text, return_tensors="pt")).logits for e in task.test])
        even = (logits[:, 1] - logits[:, 0]).mean()  # the head is untrained: let it predict both classes
        classifier.classifier.bias[0] += even
        logits[:, 0] += even
    predicted = [task.labels[number] for number in logits.argmax(dim=1).tolist()]
    assert set(predicted) == set(task.labels)
    assert data.rows(data.lengths.argmin()[None])["input_ids"].shape == (1, 8)
    expected = classification_scores([str(e.label) for e in task.test], predicted)
    assert score(classifier, data, task, fp32) == expected
    assert predict(classifier, data, task, fp32) == predicted


def test_regression_learns_how_many_words_are_of_one_kind(model: str, tmp_path: Path):
    lines = [
        {"text": " ".join(["parser"] * n + ["river"] * (6 - n)), "label": n / 2}
        for n in (0, 1, 2, 3, 4, 5, 6)
    ]
    write_split(tmp_path / "train.jsonl", lines * 6)
    write_split(tmp_path / "test.jsonl", lines)
    recipe = dataclasses.replace(QUICK, metric="pearson", epochs=10)
    result = finetune(model, load_task(tmp_path), recipe, 1)
    assert result["scores"]["pearson"] > 0.9


def test_the_aspect_comes_first_where_the_recipe_says_so(model: str, task: Task):
    tokenizer = load_tokenizer(model)
    example = Example("the river road", "water", "town")
    for pair_first, expected in ((False, "the river road [SEP] water"), (True, "water [SEP] the river road")):
        recipe = dataclasses.replace(QUICK, pair_first=pair_first)
        data = encode(tokenizer, [example], task, recipe, 12, CPU)
        assert tokenizer.decode(data.input_ids[0]).startswith(f"[CLS] {expected} [SEP] [PAD]")


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_takes_a_classifier(name: str, task: Task, tmp_path: Path):
    """Weights of the LM under a new head; what stands behind the padding changes nothing."""
    folder = byte_bpe(tmp_path / "lm") if TINY[name].causal else wordpiece(tmp_path / "lm")
    tokenizer = load_tokenizer(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lm = TINY[name].model(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    lm.save_pretrained(folder)
    classifier = load_classifier(str(folder), task, tokenizer).eval()
    stored = dict(lm.base_model.named_parameters())
    for parameter, values in classifier.base_model.named_parameters():
        assert "pooler" in parameter or torch.equal(values, stored[parameter])
    logits = []
    for length in (16, 24):
        data = encode(tokenizer, [Example("protein shard", None, "town")], task, QUICK, length, CPU)
        with torch.no_grad():
            logits.append(classifier(**data.rows(torch.tensor([0]))).logits)
    assert logits[0].shape == (1, 2)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_texts_are_cut_to_the_positions_that_training_has(name: str):
    """Found from the modules alone, since classifiers have no anatomy."""
    lm = TINY[name].model()
    assert _positions(lm) == anatomy_of(lm).max_positions


UNKNOWN: dict[str, dict[str, Any]] = {
    "roberta-prelayernorm": {**SIZES, "pad_token_id": 0},
    "bart": {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "max_position_embeddings": 40,
    },
    "t5": {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 48, "d_kv": 16},
}  # fmt: skip


@pytest.mark.parametrize("kind", UNKNOWN)
def test_whatever_transformers_has_a_classifier_of(kind: str, task: Task, tmp_path: Path):
    """Without anatomy: an encoder, and encoder-decoders, which training refuses."""
    folder = wordpiece(tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", special_tokens=[("[SEP]", 3)]
    )
    tokenizer.save_pretrained(folder)
    ends = {"eos_token_id": 3, "decoder_start_token_id": 0}
    config = AutoConfig.for_model(kind, vocab_size=400, **{**ends, **UNKNOWN[kind]})
    auto = AutoModelForMaskedLM if kind == "roberta-prelayernorm" else AutoModelForSeq2SeqLM
    auto.from_config(config).save_pretrained(folder)
    long = dataclasses.replace(task, train=(Example("river " * 90, None, "town"), *task.train))
    result = finetune(str(folder), long, dataclasses.replace(QUICK, epochs=3), 1)
    assert result["scores"]["accuracy"] > 0.6
    assert result["sequence_length"] == {"roberta-prelayernorm": 33, "bart": 40, "t5": QUICK.max_length}[kind]
    with pytest.raises(UserError, match=r"is not known|encoder-decoders"):
        load_model_config(str(folder))


def test_a_model_without_classifier_is_refused(task: Task, tmp_path: Path):
    folder = wordpiece(tmp_path / "model")
    AutoConfig.for_model("bert-generation", **SIZES).save_pretrained(folder)
    with pytest.raises(UserError, match="no sequence classifier of bert-generation models"):
        finetune(str(folder), task, QUICK, 1)
    bpe = byte_bpe(tmp_path / "t5")  # which ends no text
    AutoConfig.for_model("t5", vocab_size=600, **UNKNOWN["t5"]).save_pretrained(bpe)
    with pytest.raises(UserError, match="the token that ends a text, 1, and the tokenizer puts none there"):
        finetune(str(bpe), task, QUICK, 1)


def test_a_causal_model_without_padding_token(task: Task, tmp_path: Path):
    folder = byte_bpe(tmp_path / "gpt")
    TINY["llama"].model(vocab_size=len(load_tokenizer(folder))).save_pretrained(folder)
    result = finetune(str(folder), task, dataclasses.replace(QUICK, epochs=1), 1)
    assert 0 <= result["scores"]["accuracy"] <= 1
    assert result["sequence_length"] <= 34


def test_long_texts_are_cut_to_what_the_model_takes(task: Task, tmp_path: Path):
    model = str(tiny_model(tmp_path))
    long = dataclasses.replace(task, train=(Example("river " * 200, None, "town"), *task.train))
    result = finetune(model, long, dataclasses.replace(QUICK, epochs=1), 1)
    assert result["sequence_length"] == 64  # its positions
    result = finetune(model, long, dataclasses.replace(QUICK, epochs=1, max_length=20), 1)
    assert result["sequence_length"] == 20


def test_extended_models_are_fine_tuned_with_what_was_added(task: Task, tmp_path: Path):
    """A model that is no plain class of transformers comes back with its extension's weights, and trains."""

    def add_layer(base: PreTrainedModel, anatomy: Anatomy, settings: dict[str, Any]) -> None:
        projection = base.get_submodule(anatomy.ffn_outputs[0])
        projection.extra = nn.Linear(anatomy.hidden_size, settings["width"], dtype=base.dtype)
        projection.register_forward_hook(lambda module, _, out: out + 0.1 * module.extra(out))

    register_extension("layer of a test", add_layer)
    plain = tiny_model(tmp_path)
    model = extend(AutoModelForMaskedLM.from_pretrained(plain), "layer of a test", {"width": 32})
    model.save_pretrained(tmp_path / "extended")
    tokenizer = load_tokenizer(plain)
    tokenizer.save_pretrained(tmp_path / "extended")
    classifier = load_classifier(str(tmp_path / "extended"), task, tokenizer)
    name = "base.bert.encoder.layer.0.output.dense.extra.weight"
    assert torch.equal(classifier.get_parameter(name), model.get_parameter(name))
    result = finetune(str(tmp_path / "extended"), task, QUICK, 1)
    assert result["scores"]["accuracy"] > 0.9


def test_models_that_can_not_be_read_are_refused(model: str, task: Task, tmp_path: Path):
    tokenizer = load_tokenizer(model)
    with pytest.raises(UserError, match="no such folder"):
        load_classifier(str(tmp_path / "nowhere"), task, tokenizer)
    folder = tiny_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"the weights lack 1 parameters of the trunk, bert.encoder.layer.1.output"
    ):
        load_classifier(str(folder), task, tokenizer)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="the weights can't be read"):
        load_classifier(str(folder), task, tokenizer)


def test_a_classifier_of_other_classes_gets_a_new_head(
    model: str, task: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=len(task.labels) + 1
    ).save_pretrained(tmp_path)
    load_tokenizer(model).save_pretrained(tmp_path)
    assert finetune(str(tmp_path), task, QUICK, 1)["scores"]["accuracy"] > 0.9
    assert (
        "has a head of its own, classifier.bias of (3,) where the task needs (2,)" in capsys.readouterr().err
    )


def test_more_tokens_than_embeddings_are_refused(model: str, task: Task, tmp_path: Path):
    shutil.copytree(model, tmp_path / "model")
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens(["aneurysm"])
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"the tokenizer has \d+ tokens, the model's embeddings"):
        finetune(str(tmp_path / "model"), task, QUICK, 1)


def test_biases_and_norms_do_not_decay(model: str, task: Task):
    """With a learning rate that leaves the decay alone in sight, only matrices get smaller."""
    seen: list[torch.optim.AdamW] = []
    original = torch.optim.AdamW.__init__

    def watched(self: torch.optim.AdamW, *arguments: Any, **settings: Any) -> None:
        original(self, *arguments, **settings)
        seen.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "__init__", watched)
        finetune(model, task, dataclasses.replace(QUICK, epochs=1, weight_decay=0.3), 1)
    decays = {p.dim() > 1: g["weight_decay"] for g in seen[0].param_groups for p in g["params"]}
    assert decays == {True: 0.3, False: 0.0}


def test_scores_by_hand():
    """Counted on paper: a has precision 2/3 and recall 1, b 1 and 1/2, c is never predicted."""
    truth = ["a", "a", "b", "b", "c"]
    scores = classification_scores(truth, ["a", "a", "b", "a", "b"])
    assert scores["accuracy"] == scores["micro_f1"] == pytest.approx(3 / 5)
    assert scores["macro_f1"] == pytest.approx((4 / 5 + 1 / 2 + 0) / 3)
    assert classification_scores(["x", "y"], ["y", "x"])["matthews"] == pytest.approx(-1)
    assert regression_scores([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx({"pearson": 1, "spearman": 1})
    assert regression_scores([1.0, 2.0], [5.0, 5.0]) == {"pearson": 0.0, "spearman": 0.0}


def test_a_loss_that_is_not_finite_is_no_score(model: str, task: Task):
    """Where the label is not finite in fp32, and where the steps are far too large."""
    examples = tuple(dataclasses.replace(example, label=float(n)) for n, example in enumerate(task.train))
    huge = (dataclasses.replace(examples[0], label=1e300), *examples[1:])
    regression = dataclasses.replace(task, labels=(), train=huge, test=examples)
    with pytest.raises(
        UserError, match=r"the loss of epoch 1 is (inf|nan): .* Lower learning_rate in the recipe"
    ):
        finetune(model, regression, dataclasses.replace(QUICK, metric="pearson"), 1)


def test_weights_that_are_not_finite_are_refused(model: str, task: Task, tmp_path: Path):
    broken = AutoModelForMaskedLM.from_pretrained(model)
    with torch.no_grad():
        next(broken.base_model.parameters())[5] = float("nan")
    broken.save_pretrained(tmp_path)
    load_tokenizer(model).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"word_embeddings\.weight holds a NaN or infinity"):
        finetune(str(tmp_path), task, QUICK, 1)


def test_a_task_that_the_tokenizer_cannot_write(model: str, task: Task):
    examples = tuple(dataclasses.replace(example, text="ภาษา ไทย 語") for example in task.train)
    with pytest.raises(
        UserError, match=r"\d\d% of the tokens of .*/train\.jsonl are unknown to the tokenizer"
    ):
        finetune(model, dataclasses.replace(task, train=examples), QUICK, 1)
