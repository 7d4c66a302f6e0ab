"""Merged folders: what transformers loads of them, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from dga_scale.corpus.tokenizer import load_tokenizer, tokenizer_hash
from dga_scale.errors import UserError
from dga_scale.merging.cli import main
from dga_scale.merging.folders import ModelFolder
from dga_scale.merging.formulas import merge_tensors
from dga_scale.merging.merge import Merge
from dga_scale.merging.settings import MergeSettings
from dga_scale.storage import safetensors_stream as tensor_files
from tests.helpers.batches import dense_labels
from tests.helpers.small import SmallWorld
from tests.helpers.tiny_corpora import byte_bpe, wordpiece
from tests.helpers.tiny_models import TINY


def save(folder: Path, model: PreTrainedModel, tokenizer: Path, **how: object) -> Path:
    model.save_pretrained(folder, **how)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wordpiece(tmp_path_factory.mktemp("wordpiece") / "tokenizer")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> tuple[Path, Path]:
    """A BERT with tied embeddings, and another of its kind in bf16, in several files."""
    root = tmp_path_factory.mktemp("pair")
    torch.manual_seed(3)
    size = len(load_tokenizer(tokenizer))
    base, adapted = (TINY["bert"].model(vocab_size=size) for _ in range(2))
    sharded = save(root / "adapted", adapted.bfloat16(), tokenizer, max_shard_size="20KB")
    assert (sharded / "model.safetensors.index.json").exists()
    return save(root / "base", base, tokenizer), sharded


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def merge(base: Path, *models: Path, method: str = "linear") -> Merge:
    return Merge(ModelFolder.open(str(base)), [ModelFolder.open(str(m)) for m in models], method)


@pytest.mark.parametrize(("method", "weight"), [("linear", 0.3), ("slerp", 0.3), ("ties", 0.8)])
def test_every_tensor_is_what_the_formula_gives(
    pair: tuple[Path, Path], tmp_path: Path, method: str, weight: float
):
    settings = MergeSettings(method, weight)
    merge(*pair, method=method).write(settings, tmp_path / "merged")
    base, adapted, merged = weights(pair[0]), weights(pair[1]), weights(tmp_path / "merged")
    assert merged.keys() == base.keys()
    for name in merged:
        expected = merge_tensors(base[name], [adapted[name]], settings)
        assert torch.equal(merged[name], expected), name
    assert torch.equal(
        merged["cls.predictions.decoder.weight"], merged["bert.embeddings.word_embeddings.weight"]
    )


def test_linear_ends_are_the_inputs_bit_for_bit(pair: tuple[Path, Path], tmp_path: Path):
    for weight, source in ((0.0, pair[0]), (1.0, pair[1])):
        output = tmp_path / f"at {weight}"
        merge(*pair).write(MergeSettings("linear", weight), output)
        expected, merged = weights(source), weights(output)
        assert all(torch.equal(merged[name], expected[name]) for name in expected)
        kept = {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
        assert {path.name for path in output.iterdir()} - kept == {"model.safetensors", "README.md"}
        assert AutoConfig.from_pretrained(output).dtype == torch.float32  # the wider of fp32 and bf16


def test_the_folder_is_complete(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensor_files, "MAX_FILE_BYTES", 30_000)
    output = tmp_path / "merged"
    merge(*pair, method="ties").write(MergeSettings("ties", 1.0, 0.5), output)
    assert len(list(output.glob("model-*.safetensors"))) > 1
    _, info = AutoModelForMaskedLM.from_pretrained(output, output_loading_info=True)
    assert not any(info.values())
    assert tokenizer_hash(load_tokenizer(output)) == tokenizer_hash(load_tokenizer(pair[0]))
    card = (output / "README.md").read_text()
    assert "# adapted merged with base" in card
    assert "ties, weight 1, density 0.5 (0: base; 1: adapted)" in card
    assert str(tmp_path.parent) not in card


def test_names_of_old_checkpoints_tied_copies_and_buffers(
    pair: tuple[Path, Path], tokenizer: Path, tmp_path: Path
):
    """As bert-base-uncased on the hub: gamma and beta, a pooler, int64 position ids, both tied names."""
    base = tmp_path / "old"
    shutil.copytree(pair[0], base)
    stored = load_file(base / "model.safetensors")
    stored["cls.predictions.decoder.weight"] = stored["bert.embeddings.word_embeddings.weight"].clone()
    stored["bert.pooler.dense.weight"] = torch.zeros(32, 32)
    stored["bert.embeddings.position_ids"] = torch.arange(34)
    for name in [n for n in stored if "LayerNorm" in n]:
        old = name.replace(".weight", ".gamma").replace(".bias", ".beta")
        stored[old] = stored.pop(name)
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    merge(base, pair[1]).write(MergeSettings("linear", 0.0), tmp_path / "merged")
    expected, merged = weights(pair[0]), weights(tmp_path / "merged")
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_several_models_are_averaged(pair: tuple[Path, Path], tokenizer: Path, tmp_path: Path):
    other = save(tmp_path / "c", TINY["bert"].model(vocab_size=len(load_tokenizer(tokenizer))), tokenizer)
    merge(pair[0], pair[1], other).write(MergeSettings("linear", 1.0), tmp_path / "merged")
    one, two, merged = weights(pair[1]), weights(other), weights(tmp_path / "merged")
    for name, value in merged.items():
        torch.testing.assert_close(value, (one[name] + two[name]) / 2, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"slerp .*--model names 2"):
        merge(pair[0], pair[1], other, method="slerp")


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_comes_back(name: str, tokenizer: Path, tmp_path: Path):
    size = len(load_tokenizer(tokenizer))
    models = [TINY[name].model(vocab_size=size) for _ in range(2)]
    folders = [save(tmp_path / str(n), model, tokenizer) for n, model in enumerate(models)]
    if name == "nomic_bert":
        with pytest.raises(UserError, match="a nomic_bert model, whose files hold other tensors"):
            merge(*folders).write(MergeSettings("linear", 0.25), tmp_path / "merged")
        return
    merge(*folders).write(MergeSettings("linear", 0.25), tmp_path / "merged")
    merged, info = type(models[0]).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    for parameter, base, adapted in zip(merged.parameters(), *(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(parameter, 0.75 * base + 0.25 * adapted, rtol=0, atol=1e-6)


def test_models_of_other_kinds_are_refused(pair: tuple[Path, Path], tokenizer: Path, tmp_path: Path):
    size = len(load_tokenizer(tokenizer))
    roberta = save(tmp_path / "roberta", TINY["roberta"].model(vocab_size=size), tokenizer)
    with pytest.raises(UserError, match=r"roberta is a roberta model, --base .*base a bert model"):
        merge(pair[0], roberta)
    wide = save(tmp_path / "wide", TINY["bert"].model(vocab_size=size, intermediate_size=64), tokenizer)
    with pytest.raises(UserError, match=r"intermediate.dense.weight is \(48, 32\) in .* and \(64, 32\) in"):
        merge(pair[0], wide)
    deep = save(tmp_path / "deep", TINY["bert"].model(vocab_size=size, num_hidden_layers=3), tokenizer)
    with pytest.raises(
        UserError, match=r"base has no tensor bert.encoder.layer.2.attention.self.query.weight"
    ):
        merge(pair[0], deep)
    bpe = byte_bpe(tmp_path / "bpe")
    other = save(tmp_path / "other", TINY["bert"].model(vocab_size=size), bpe)
    with pytest.raises(UserError, match="other has another tokenizer than --base"):
        merge(pair[0], other)


def test_weights_that_can_not_be_read_are_refused(pair: tuple[Path, Path], tmp_path: Path):
    pickled = tmp_path / "pickled"
    shutil.copytree(pair[0], pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled: no safetensors in it"):
        ModelFolder.open(str(pickled))
    cut = tmp_path / "cut"
    shutil.copytree(pair[0], cut)
    (cut / "model.safetensors").write_bytes((pair[0] / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cut/model.safetensors: damaged"):
        merge(cut, pair[1])
    with pytest.raises(UserError, match="no such folder"):
        ModelFolder.open(str(tmp_path / "nowhere"))


def test_nothing_is_left_of_a_merge_that_fails(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dga_scale.merging.merge.write_model_files", full_disk)
    with pytest.raises(UserError, match="could not be written: No space left"):
        merge(*pair).write(MergeSettings(), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def adapted(world: SmallWorld) -> Path:
    """The world's model, moved by a little noise."""
    model = AutoModelForMaskedLM.from_pretrained(world.model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return save(world.model.parent / "adapted", model, world.model)


def test_a_sweep_scores_without_writing_models(
    world: SmallWorld, adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    corpora = ["--corpus", str(world.corpus), "--general_corpus", str(world.general_corpus / "validation")]
    results = tmp_path / "results"
    arguments = ["--base", str(world.model), "--model", str(adapted), "--results", str(results), *corpora]
    main([*arguments, "--sweep", "0,0.5,1"])
    points = json.loads((results / "sweep.json").read_text())["points"]
    assert [point["weight"] for point in points] == [0, 0.5, 1]
    assert abs(points[0]["domain_loss"] - points[2]["domain_loss"]) > 0.1
    for point, folder in ((points[0], world.model), (points[2], adapted)):
        for name, corpus in (("domain", world.corpus), ("general", world.general_corpus)):
            assert point[f"{name}_loss"] == pytest.approx(
                masked_loss(folder, corpus / "validation"), rel=5e-3
            )
    assert (results / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["sweep.json", "sweep.png"]
    assert "general loss" in capsys.readouterr().out


def masked_loss(folder: Path, corpus: Path) -> float:
    """The model's own loss, in fp32, over its full logits."""
    from dga_scale.corpus.loading.masking import MaskingPolicy
    from dga_scale.corpus.loading.streams import EvalBatches
    from dga_scale.corpus.shards import Corpus

    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    opened = Corpus.open(corpus)
    total, count = 0.0, 0
    for batch in EvalBatches(
        opened, MaskingPolicy.for_corpus(opened, 0.15), batch_size=8, rank=0, world_size=1
    ):
        labels = dense_labels(batch)
        count_here = int((labels != -100).sum())
        with torch.no_grad():
            loss = model(batch.masked_ids, attention_mask=batch.attention_mask, labels=labels).loss
        total, count = total + float(loss) * count_here, count + count_here
    return total / count


def test_a_corpus_of_another_tokenizer_is_refused(world: SmallWorld, pair: tuple[Path, Path], tmp_path: Path):
    arguments = ["--base", str(pair[0]), "--model", str(pair[1]), "--results", str(tmp_path / "results")]
    corpora = ["--corpus", str(world.corpus), "--general_corpus", str(world.general_corpus)]
    with pytest.raises(UserError, match=r"^--corpus .*corpus: validation: does not match the model"):
        main([*arguments, *corpora, "--sweep", "0,1"])
    with pytest.raises(UserError, match=r"^--general_corpus .*nowhere: no such folder"):
        main(["--base", str(world.model), "--model", str(world.model), "--sweep", "0,1", *corpora[:3],
              str(tmp_path / "nowhere")])  # fmt: skip


def test_a_sweep_with_output_writes_each_model(world: SmallWorld, adapted: Path, tmp_path: Path):
    output = tmp_path / "models"
    main(["--base", str(world.model), "--model", str(adapted), "--output", str(output), "--sweep", "0.25,1",
          "--corpus", str(world.corpus), "--general_corpus", str(world.general_corpus), "--results",
          str(tmp_path / "results"), "--max_eval_samples", "8"])  # fmt: skip
    assert sorted(path.name for path in output.iterdir()) == ["weight-0.25", "weight-1"]
    merged, expected = weights(output / "weight-1"), weights(adapted)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--output is missing"),
        (["--sweep", "0,1"], "--sweep needs --corpus"),
        (["--sweep", "0,x"], "'0,x' is not a list of numbers"),
        (["--sweep", "0,1.5", "--corpus", "c", "--general_corpus", "g"], "--weight 1.5 .* must be from 0"),
        (["--output", "."], "--output .: it exists already"),
        (["--output", "new", "--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["--outputs", "new"], "unknown option --outputs. Did you mean --output"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str):
    with pytest.raises(UserError, match=message):
        main(["--base", "a", "--model", "b", *arguments])
