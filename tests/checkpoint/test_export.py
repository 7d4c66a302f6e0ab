"""A checkpoint as a Hugging Face folder: what ``from_pretrained`` loads is what was trained."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, BertConfig

from dga_scale.checkpoint.export import consolidate
from dga_scale.checkpoint.store import checkpoint_path, commit
from dga_scale.errors import UserError
from dga_scale.storage import safetensors_stream as tensor_files
from dga_scale.storage.safetensors_stream import Entry, record_of, write_safetensors
from tests.helpers.ranks import REPOSITORY, run_ranks
from tests.helpers.tiny_models import TINY
from tests.helpers.training import (
    MaskedLM,
    Setup,
    full_weights,
    save,
    tiny_bert,
    tiny_engine,
    tiny_tokenizer,
    train_step,
)

UNDER_STAGE_3 = ["bert", "roberta", "gpt2", "llama tied"]
IDS = torch.arange(5, 25).view(2, 10)


def trained(folder: Path, names: list[str], setup: Setup) -> dict[str, Tensor]:
    """Train a step of each model, save, and return the live engine's logits."""
    logits = {}
    for name in names:
        engine = tiny_engine(setup, MaskedLM(TINY[name].model().train()))
        labels = torch.where(IDS % 3 == 0, IDS, -100)
        engine.backward(engine(IDS, labels, 0.1))
        engine.step()
        save(engine, folder / name, 1)
        engine.module.eval()
        with torch.no_grad():
            logits[name] = engine.module.lm(input_ids=IDS).logits
        engine.destroy()
    return logits


def loaded(
    path: Path, causal: bool, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> tuple[Any, dict[str, Any]]:
    auto = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    model, info = auto.from_pretrained(
        path, output_loading_info=True, dtype=dtype, attn_implementation=attention
    )
    return model.eval(), info


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("runs")
    others = [name for name in TINY if name not in UNDER_STAGE_3]
    logits: dict[str, Tensor] = run_ranks(2, trained, folder, others, Setup(2))[0]
    logits |= run_ranks(2, trained, folder, UNDER_STAGE_3, Setup(3, persistence=500))[0]
    return folder, logits


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_comes_back(
    name: str, runs: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    """Tied or not, fused or not: the live engine's logits, no key missing and none too many."""
    folder, logits = runs
    output = consolidate(folder / name, None, tmp_path / "model")
    model, info = loaded(output, TINY[name].causal, attention="eager")
    assert not any(info.values()), info
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, logits[name], rtol=1e-5, atol=1e-5)
    untrained = TINY[name].model()(input_ids=IDS).logits
    assert (untrained - logits[name]).abs().max() > 1e-3
    assert not list(output.rglob("*.bin")), "no pickle"


def trained_in(folder: Path, setup: Setup) -> tuple[dict[str, Tensor], Tensor]:
    engine = tiny_engine(setup)
    for step in range(2):
        train_step(engine, step)
    save(engine, folder, 2)
    engine.module.eval()
    with torch.no_grad():
        logits = engine.module.lm(input_ids=IDS).logits
    weights = full_weights(engine)
    engine.destroy()
    return weights, logits


@pytest.mark.parametrize(
    "setup", [Setup(0), Setup(2, offload=True), Setup(0, "bf16"), Setup(2, "bf16")], ids=str
)
def test_weights_are_the_optimizers_in_every_stage(setup: Setup, tmp_path: Path) -> None:
    weights, logits = run_ranks(2, trained_in, tmp_path / "run", setup)[0]
    output = consolidate(tmp_path / "run", 2, tmp_path / "model")
    model, _ = loaded(output, causal=False)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    assert json.loads((output / "config.json").read_text())["dtype"] == "float32"
    assert AutoTokenizer.from_pretrained(output)("word7 word9").input_ids == [7, 9]
    half = consolidate(tmp_path / "run", 2, tmp_path / "half", dtype="bfloat16")
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    size = {p: (p / "model.safetensors").stat().st_size for p in (output, half)}
    assert size[half] < 0.6 * size[output]
    model, _ = loaded(half, causal=False, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name].bfloat16()), name
    if setup.precision == "bf16":
        with torch.no_grad():
            ours = model(input_ids=IDS).logits
        torch.testing.assert_close(ours, logits, rtol=0.01, atol=0.01)


def test_several_files_and_an_index(
    runs: tuple[Path, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, logits = runs
    monkeypatch.setattr(tensor_files, "MAX_FILE_BYTES", 20_000)
    output = consolidate(folder / "bert", None, tmp_path / "model")
    index = json.loads((output / "model.safetensors.index.json").read_text())
    files = sorted(output.glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 25_000 for file in files)
    names = {name: file.name for file in files for name in safe_open(file, "pt").keys()}  # noqa: SIM118
    assert names == index["weight_map"]
    model, info = loaded(output, causal=False, attention="eager")
    assert not any(info.values())
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, logits["bert"], rtol=1e-5, atol=1e-5)


def test_a_chosen_step_and_what_is_refused(tmp_path: Path) -> None:
    run_ranks(2, trained_in, tmp_path / "run", Setup(1))
    output = tmp_path / "model"
    with pytest.raises(UserError, match=r"--step 7: .*manifest.json is missing. The run holds step-000002"):
        consolidate(tmp_path / "run", 7, output)
    with pytest.raises(UserError, match=r"no checkpoint in it. Give the folder of a run"):
        consolidate(tmp_path, None, output)
    output.mkdir()
    with pytest.raises(UserError, match="exists already"):
        consolidate(tmp_path / "run", 2, output)
    output.rmdir()
    shard = checkpoint_path(tmp_path / "run", 2) / "rank-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"--step 2: .*rank-00001.safetensors does not have the content"):
        consolidate(tmp_path / "run", 2, output)
    assert not output.exists()


def poisoned(folder: Path) -> None:
    engine = tiny_engine(Setup(0))
    train_step(engine, 0)
    with torch.no_grad():
        engine.module.lm.bert.encoder.layer[0].output.dense.bias[2] = float("inf")
    save(engine, folder, 1)
    engine.destroy()


def test_weights_that_are_not_finite_are_not_handed_over(tmp_path: Path) -> None:
    run_ranks(1, poisoned, tmp_path / "run")
    with pytest.raises(
        UserError, match=r"layer\.0\.output\.dense\.bias holds a NaN or infinity .*older step"
    ):
        consolidate(tmp_path / "run", 1, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_full_disk_leaves_nothing(runs: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, _ = runs
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"--output .*model could not be written: .*Free disk space"):
            consolidate(folder / "bert", None, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def large_checkpoint(run: Path) -> int:
    """A made-up checkpoint of a BERT with many layers in two pieces a parameter; its bytes in fp32."""
    config = BertConfig(
        vocab_size=1000, hidden_size=512, num_hidden_layers=12, num_attention_heads=8, intermediate_size=2048
    )
    config.architectures = ["BertForMaskedLM"]
    final = checkpoint_path(run, 1)
    temporary = final.with_name(final.name + ".tmp")
    (temporary / "model").mkdir(parents=True)
    config.save_pretrained(temporary / "model")
    tiny_tokenizer().save_pretrained(temporary / "model")
    with torch.device("meta"):
        from transformers import BertForMaskedLM

        shapes = {n: tuple(p.shape) for n, p in BertForMaskedLM(config).named_parameters()}
    for rank in (0, 1):
        entries, places = [], {}
        for name, shape in shapes.items():
            numel = torch.Size(shape).numel()
            start, stop = numel * rank // 2, numel * (rank + 1) // 2
            places[f"weight:{name}"] = [start, shape]
            length = stop - start
            entries.append(
                Entry(f"weight:{name}", torch.float32, (length,), lambda length=length: torch.zeros(length))
            )
        write_safetensors(
            temporary / f"rank-0000{rank}.safetensors", entries, {"segments": json.dumps(places)}
        )
    files = [p for p in temporary.rglob("*") if p.is_file()]
    commit(temporary, final, {str(p.relative_to(temporary)): record_of(p) for p in files}, 1, 2)
    return sum(4 * torch.Size(shape).numel() for shape in shapes.values())


PEAK_MEMORY = """
import sys, threading, time
from pathlib import Path
import transformers.models.bert.modeling_bert
from dga_scale.checkpoint.export import consolidate

def own():  # bytes that are not pages of a file, which the system can drop at any time
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))

before, peak, done = own(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, own())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
consolidate(Path(sys.argv[1]), None, Path(sys.argv[2]))
done = True
thread.join()
print("PEAK", peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its own memory from Linux's /proc")
def test_memory_is_a_small_part_of_the_model(tmp_path: Path) -> None:
    size = large_checkpoint(tmp_path / "run")
    assert size > 150e6
    command = [sys.executable, "-c", PEAK_MEMORY, str(tmp_path / "run"), str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split("PEAK")[1]) < 0.25 * size
    assert (tmp_path / "model" / "model.safetensors").stat().st_size > size


def test_tiny_bert_is_what_the_tests_mean() -> None:
    """Its decoder is tied: the checkpoint holds the embedding once."""
    lm = tiny_bert()
    assert lm.cls.predictions.decoder.weight is lm.bert.embeddings.word_embeddings.weight
