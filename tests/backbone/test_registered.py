"""An architecture that a file of the user names: that of docs/extending.md, in training and in a plan."""

import json
import re
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, Starcoder2Config

from dga_scale.backbone import anatomy
from dga_scale.corpus.cli import main as shard
from dga_scale.corpus.tokenizer import load_tokenizer
from dga_scale.errors import UserError
from dga_scale.planning.cli import main as plan
from dga_scale.train import cli
from tests.helpers.forks import launch
from tests.helpers.pictures import no_pictures
from tests.helpers.ranks import REPOSITORY
from tests.helpers.tiny_corpora import byte_bpe, texts, write_jsonl
from tests.helpers.tiny_models import SIZES

PAGE = REPOSITORY / "docs" / "extending.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = byte_bpe(tmp_path_factory.mktemp("models") / "starcoder2")
    size = len(load_tokenizer(folder))
    values = {**SIZES, "num_key_value_heads": 2, "vocab_size": size, "bos_token_id": 0, "eos_token_id": 0}
    AutoModelForCausalLM.from_config(Starcoder2Config(**values)).save_pretrained(folder)
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (example,) = (each for each in examples if "STARCODER2" in each)
    file = tmp_path / "starcoder2.py"
    file.write_text(example)
    return file


def train(flags: list[str]) -> None:
    cli.end_rank = sys.exit
    sys.argv = ["dga_train.py", *flags]
    with no_pictures():
        cli.train_command()


def test_the_file_of_the_page_trains_and_protects(folder: Path, file: Path, tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", texts(200))
    corpus = tmp_path / "corpus"
    shard([str(text), "--tokenizer", str(folder), "--output", str(corpus), "--sequence_length", "32"])
    flags = [
        f"--model={folder}", f"--corpus={corpus}", f"--ds_config={REPOSITORY / 'ds_configs' / 'zero2.json'}",
        f"--output_dir={tmp_path / 'run'}", "--method=das", "--max_steps=2", "--bf16=false",
        "--per_device_train_batch_size=2", "--gradient_accumulation_steps=1", "--global_batch_size=4",
        "--importance_samples=4", "--dropout=0.1",
    ]  # fmt: skip
    refused = launch(2, train, flags)
    trained = launch(2, train, [*flags, "--import", str(file)])
    assert refused.wait() == [2, 2]
    words = r"error: .*starcoder2' is not known here \(known: .*--import FILE\.py: docs/extending\.md shows"
    assert re.search(words, refused.output(0))
    assert trained.wait() == [0, 0], trained.output(0)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2


def test_a_plan_takes_the_file(
    folder: Path, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anatomy, "_registered", dict(anatomy._registered))  # here, and no further
    flags = ["--model", str(folder), "--gpus=2", "--gpu=h100", "--json", "--sequence_length=32"]
    flags += [f"--ds_config={REPOSITORY / 'ds_configs' / 'zero2.json'}"]
    assert plan([*flags, "--import", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)
    with pytest.raises(UserError, match="no such Python file"):
        plan([*flags, "--import", str(file.with_name("none.py"))])
