"""Models against their base: figures computed anew, resumption, labels, what can't be compared."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from scipy import stats
from transformers import AutoModelForMaskedLM, BertModel, GPT2Config, GPT2LMHeadModel

from dga_scale.corpus.cli import main as shard
from dga_scale.corpus.loading.masking import MaskingPolicy
from dga_scale.corpus.loading.streams import EvalBatches
from dga_scale.corpus.shards import Corpus
from dga_scale.corpus.tokenizer import load_tokenizer
from dga_scale.endtasks import evaluate as module
from dga_scale.endtasks.evaluate import parse_models
from dga_scale.endtasks.evaluate_cli import main
from dga_scale.errors import UserError
from dga_scale.logging.plots import comparison_figure
from dga_scale.report.scores import load_scores
from tests.helpers.small import DOMAIN, GENERAL, write_text
from tests.helpers.tiny_tasks import examples, tiny_model, write_split, write_task


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, two models adapted from it with two seeds, corpora "wiki" and "acl", two tasks."""
    root = tmp_path_factory.mktemp("world")
    base = tiny_model(root, "base_model")
    for name, words, seed in (("acl", DOMAIN, 0), ("wiki", GENERAL, 1)):
        text = write_text(root / f"{name}.jsonl", words, 200, seed)
        shard([str(text), "--tokenizer", str(base), "--sequence_length", "32", "--validation_share", "0.4",
               "--num_workers", "1", "--output", str(root / "corpora" / name)])  # fmt: skip
    for seed in (1, 2):
        adapt(base, root / f"run-{seed}" / "model", Corpus.open(root / "corpora" / "acl"), seed)
    write_task(root / "tasks" / "intent")
    write_task(root / "tasks" / "glue", dev=12, test=0)
    return root


def adapt(base: Path, output: Path, corpus: Corpus, seed: int) -> None:
    """Twenty steps of plain masked LM."""
    torch.manual_seed(seed)
    model = AutoModelForMaskedLM.from_pretrained(base).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches = EvalBatches(corpus, MaskingPolicy.for_corpus(corpus, 0.3), batch_size=16, rank=0, world_size=1)
    for _, batch in zip(range(20), batches, strict=False):
        plain_loss(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(output)
    load_tokenizer(base).save_pretrained(output)


def plain_loss(model: Any, batch: Any) -> torch.Tensor:
    """Cross-entropies of the predicted tokens, by the model's own forward."""
    logits = model(input_ids=batch.masked_ids, attention_mask=batch.attention_mask).logits
    at = logits.flatten(0, 1)[batch.positions]
    losses = F.cross_entropy(at, batch.labels, ignore_index=-100, reduction="none")
    return losses[batch.labels != -100]


def suite(world: Path, **changes: Any) -> str:
    content = {
        "domain_corpora": [str(world / "corpora" / "acl")],
        "general_corpora": [str(world / "corpora" / "wiki")],
        "domain_tasks": [str(world / "tasks" / "intent")],
        "general_tasks": [str(world / "tasks" / "glue")],
        "seeds": 2,
        "recipe": {"epochs": 4, "learning_rate": 3e-3, "metric": "accuracy", "precision": "fp32"},
        **changes,
    }
    path = world / "suite.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def run(
    world: Path, output: Path, models: list[str], base: str = "base_model", **changes: Any
) -> dict[str, Any]:
    arguments = ["--base", str(world / base), "--suite", suite(world, **changes), "--output_dir", str(output)]
    assert main([*arguments, "--model", *models]) == 0
    load_scores(output)  # what the report reads
    return json.loads((output / "results.json").read_text())


def test_one_model_against_its_base(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    result = run(world, tmp_path / "out", [str(world / "run-1" / "model")])
    assert list(result["models"]) == ["base", "run-1"]
    base, own = result["models"]["base"], result["models"]["run-1"]

    # Losses: plain transformers on the same masks, in fp32 where ours is bf16.
    for name, kind in (("acl", "domain"), ("wiki", "general")):
        corpus = Corpus.open(world / "corpora" / name / "validation")
        batches = EvalBatches(
            corpus, MaskingPolicy.for_corpus(corpus, 0.15), batch_size=16, rank=0, world_size=1
        )
        losses = {}
        with torch.no_grad():
            for label, folder in (("base", "base_model"), ("run-1", "run-1/model")):
                model = AutoModelForMaskedLM.from_pretrained(world / folder).eval()
                losses[label] = torch.cat([plain_loss(model, batch) for batch in batches]).mean().item()
        for label, entry in (("base", base), ("run-1", own)):
            found = entry["corpora"][name]
            assert found["kind"] == kind
            assert found["loss"]["mean"] == pytest.approx(losses[label], abs=5e-3)
            assert found["perplexity"] == pytest.approx(math.exp(found["loss"]["mean"]))
            assert entry[f"{kind}_loss"]["mean"] == found["loss"]["mean"]
        gain = own["corpora"][name]["difference"]
        assert gain["mean"] == pytest.approx(losses["run-1"] - losses["base"], abs=8e-3)
        assert gain["low"] < gain["mean"] < gain["high"]
    assert own["corpora"]["acl"]["difference"]["mean"] < -0.1
    assert own["corpora"]["acl"]["difference"]["p_t"] < 0.01
    assert base["corpora"]["acl"]["difference"] is None

    # Scores: over the seeds that finetune wrote, seed by seed.
    seeds = {
        label: [
            json.loads((tmp_path / "out" / label / "intent" / f"seed-{n}.json").read_text())["scores"][
                "accuracy"
            ]
            for n in (1, 2)
        ]
        for label in ("base", "run-1")
    }
    score = own["tasks"]["intent"]
    assert score["values"] == seeds["run-1"]
    assert score["score"]["mean"] == pytest.approx(sum(seeds["run-1"]) / 2)
    reference = stats.ttest_rel(seeds["run-1"], seeds["base"])
    assert score["difference"]["mean"] == pytest.approx((sum(seeds["run-1"]) - sum(seeds["base"])) / 2)
    # Two seeds of a tiny model may score as the base's do: no difference, of which scipy's p is 0 / 0.
    expected_p = 1.0 if seeds["run-1"] == seeds["base"] else reference.pvalue
    assert score["difference"]["p_t"] == pytest.approx(expected_p)
    assert score["majority_share"] == 0.5
    assert own["tasks"]["glue"]["scored_on"] == "dev"

    printed = capsys.readouterr().out
    assert "domain: acl, loss" in printed
    assert "With 2 seeds the sign-flip test can't fall below 0.5" in printed
    assert "Scored on dev.jsonl, there being no test.jsonl: glue" in printed
    assert "intent: not measured; name the raw text" in printed
    assert (tmp_path / "out" / "trade_off.png").read_bytes().startswith(b"\x89PNG")

    # Again: nothing is computed twice.
    monkeypatch.setattr(module, "load_model", lambda folder: pytest.fail(f"{folder} was loaded again"))
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("seed-*.json")}
    assert len(files) == 8
    assert run(world, tmp_path / "out", [str(world / "run-1" / "model")]) == result
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("seed-*.json")} == files


def test_models_of_one_label_are_its_seeds(world: Path, tmp_path: Path):
    models = [f"mlm={world / f'run-{seed}' / 'model'}" for seed in (1, 2)]
    few = {"general_tasks": [], "seeds": 1, "general_corpora": [], "jobs": 2}
    few["recipe"] = {"epochs": 4, "learning_rate": 3e-3, "metric": "accuracy", "max_test_examples": 20}
    first = run(world, tmp_path / "out", models[:1], **few)
    assert "intent is scored on 20 of its 24 examples." in first["notes"]
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("seed-*.json")}
    assert len(kept) == 2
    result = run(world, tmp_path / "out", models, **few)
    assert kept.items() <= {file: file.stat().st_mtime_ns for file in tmp_path.rglob("seed-*.json")}.items()
    base, mlm = result["models"]["base"], result["models"]["mlm"]
    loss = mlm["corpora"]["acl"]
    single = [
        run(world, tmp_path / model[-9:-6], [model], domain_tasks=[], general_tasks=[], general_corpora=[])
        for model in models
    ]
    assert loss["values"] == [each["models"]["mlm"]["corpora"]["acl"]["loss"]["mean"] for each in single]
    assert loss["over"] == "models"
    reference = stats.ttest_1samp(loss["values"], base["corpora"]["acl"]["loss"]["mean"])
    assert loss["difference"]["p_t"] == pytest.approx(reference.pvalue)
    assert loss["difference"]["p_sign_flip"] == 0.5
    assert loss["loss"]["count"] == mlm["tasks"]["intent"]["score"]["count"] == 2
    assert (tmp_path / "out" / "mlm" / "2" / "intent" / "seed-1.json").exists()
    assert not (tmp_path / "out" / "trade_off.png").exists()


def test_overlap_with_the_unlabelled_text(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Two of the 24 test examples are put into the text, one of them among other words."""
    task = write_task(tmp_path / "leaky")
    long = [{"text": " ".join(f"{word}{n}" for word in DOMAIN[:10]), "label": "town"} for n in range(2)]
    write_split(task / "test.jsonl", [*examples(22, 2), *long])
    text = [example["text"] for example in long]
    changes = {"domain_corpora": [], "general_corpora": [], "general_tasks": [], "seeds": 1}
    model = str(world / "run-1" / "model")
    changes |= {"domain_tasks": [str(task)], "unlabelled_text": [str(tmp_path / "text.txt")]}
    with pytest.raises(UserError, match=r"text\.txt: no such file"):
        run(world, tmp_path / "out", [model], **changes)
    assert not (tmp_path / "out").exists()
    (tmp_path / "text.txt").write_text(f"{text[0]}\nelse\nwell {text[1]} indeed\n")
    result = run(world, tmp_path / "out", [model], **changes)
    assert result["overlap"]["leaky"]["found"] == 2
    printed = capsys.readouterr().out
    assert (
        "2 of 24 scored examples (8.3%) share eight words in a row with the unlabelled text; shard_"
        in printed
    )

    arguments = [
        str(world / "acl.jsonl"),
        "--tokenizer",
        model,
        "--num_workers",
        "1",
        "--validation_share",
        "0.4",
    ]
    arguments += ["--sequence_length", "32", "--exclude", str(task / "test.jsonl")]
    shard([*arguments, "--output", str(tmp_path / "clean")])
    changes["domain_corpora"] = [str(tmp_path / "clean")]
    result = run(world, tmp_path / "out", [model], **changes)
    assert result["overlap"]["leaky"]["excluded_from"] == ["clean"]
    assert "their documents were left out of clean" in capsys.readouterr().out


def test_a_model_of_another_tokenizer_is_compared_by_its_scores_only(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = tiny_model(tmp_path, "other")
    tokenizer = load_tokenizer(other)
    tokenizer.add_tokens(["newword"])
    tokenizer.save_pretrained(other)
    model = AutoModelForMaskedLM.from_pretrained(other)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(other)
    few = {"general_tasks": [], "seeds": 1, "general_corpora": []}
    result = run(world, tmp_path / "out", [str(other)], **few)
    assert result["models"]["other"]["corpora"] == {}
    assert result["models"]["other"]["tasks"]["intent"]["difference"] is not None
    printed = capsys.readouterr().out
    assert "can't be compared" in printed
    assert "other has another tokenizer than the base: its tokens stand for other text" in printed
    with pytest.raises(UserError, match=r"losses and perplexities can't be compared\. Give the base that"):
        run(world, tmp_path / "out", [str(other)], **few, domain_tasks=[])
    with pytest.raises(UserError, match=r"does not match the model: it has"):
        run(world, tmp_path / "new", [str(world / "run-1" / "model")], base=str(other), **few)


def test_a_model_without_lm_head_has_scores_but_no_losses(world: Path, tmp_path: Path):
    """A sentence encoder: fine-tuned like any other, refused where held-out text is to be predicted."""
    BertModel.from_pretrained(world / "base_model", add_pooling_layer=False).save_pretrained(
        tmp_path / "trunk"
    )
    load_tokenizer(world / "base_model").save_pretrained(tmp_path / "trunk")
    few = {"general_tasks": [], "seeds": 1, "general_corpora": []}
    with pytest.raises(UserError, match=r"trunk: the weights have no whole LM head \(cls"):
        run(world, tmp_path / "out", [str(tmp_path / "trunk")], **few)
    result = run(world, tmp_path / "tasks", [str(tmp_path / "trunk")], **few, domain_corpora=[])
    assert 0 <= result["models"]["trunk"]["tasks"]["intent"]["score"]["mean"] <= 1


def test_a_causal_model_and_a_masked_base(world: Path, tmp_path: Path):
    tokenizer = load_tokenizer(world / "base_model")
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "causal")
    tokenizer.save_pretrained(tmp_path / "causal")
    with pytest.raises(
        UserError, match="causal is a causal LM and the base a masked one: they predict other"
    ):
        run(world, tmp_path / "out", [str(tmp_path / "causal")], domain_tasks=[], general_tasks=[])


def test_the_figure_has_a_point_for_each_label_and_bars_for_its_seeds():
    figure = comparison_figure([("base", [4.0], [3.0]), ("mlm", [3.0, 3.2], [3.5, 3.1])])
    base, mlm = figure.axes[0].containers
    assert [base[0].get_xydata().tolist(), mlm[0].get_xydata().tolist()] == [[[4.0, 3.0]], [[3.1, 3.3]]]
    assert (base.has_xerr, base.has_yerr) == (False, False)
    (horizontal,), (vertical,) = (bars.get_segments() for bars in mlm[2])
    spread = math.sqrt(0.02), math.sqrt(0.08)  # standard deviations of two values: |a - b| / sqrt(2)
    assert horizontal[:, 0] == pytest.approx([3.1 - spread[0], 3.1 + spread[0]])
    assert vertical[:, 1] == pytest.approx([3.3 - spread[1], 3.3 + spread[1]])


def test_labels(tmp_path: Path):
    (tmp_path / "a=b").mkdir()
    found = parse_models([f"{tmp_path}/a", f"mlm={tmp_path}/x", f"{tmp_path}/r/model", f"mlm={tmp_path}/y"])
    assert [(c.label, len(c.folders)) for c in found] == [("a", 1), ("mlm", 2), ("r", 1)]
    for models, message in (
        (["x/run/model", "y/run/model"], r"another model is labelled run too"),
        (["run=x", "y/run/model"], r"another model is labelled run too"),
        (["base=x"], r"'base' can't be its label"),
        (["a/b=x"], r"'a/b' can't be its label"),
        ([str(tmp_path / "a=b")], r"'a=b' can't be its label"),
        (["run="], r"can't be its label"),
    ):
        with pytest.raises(UserError, match=message):
            parse_models(models)
