"""The command line: its help, its summary, its errors."""

import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import BertConfig

from dga_scale.corpus.cli import build_parser, main
from dga_scale.corpus.reading.files import COMPRESSIONS
from dga_scale.corpus.reading.sources import FORMATS
from dga_scale.corpus.sharding.staging import ShardSettings
from dga_scale.corpus.shards import Corpus
from dga_scale.corpus.tokenizer import load_tokenizer
from dga_scale.errors import EXIT_USER_ERROR, UserError
from tests.helpers import tiny_corpora as tiny
from tests.helpers.ranks import REPOSITORY


def test_help_documents_every_option_with_its_default() -> None:
    text = " ".join(build_parser().format_help().partition("\noptions:")[2].split())
    for field in fields(ShardSettings):
        if field.name not in ("tokenizer", "tokenizer_hash", "exclude", "exclude_hash"):
            option = re.search(rf"--{field.name} .*?\(default: (\S+)\)", text)
            assert option is not None, field.name
            assert option[1] == str(field.default), field.name
    assert all(action.help for action in build_parser()._actions)


def test_help_names_every_format_of_files() -> None:
    words = set(re.findall(r"\.\w+", build_parser().format_help()))
    assert {*FORMATS, *COMPRESSIONS} <= words


def test_the_tool_and_its_error(tmp_path: Path) -> None:
    command = [sys.executable, "tools/shard_corpus.py", str(tmp_path / "none.txt")]
    command += ["--tokenizer", str(tmp_path / "none"), "--output", str(tmp_path / "corpus")]
    failed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert failed.returncode == EXIT_USER_ERROR
    assert failed.stderr.startswith(f"error: --tokenizer {tmp_path}/none: no such folder")
    assert "Traceback" not in failed.stderr


def test_summary(wordpiece: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = tiny.texts(1200)
    tiny.write_jsonl(tmp_path / "a.jsonl", [*documents, documents[3], "", "\x01"], field="body")
    output = str(tmp_path / "corpus")
    arguments = [str(tmp_path / "a.jsonl"), "--tokenizer", str(wordpiece), "--output", output]
    arguments += [
        "--text_field",
        "body",
        "--num_workers",
        "1",
        "--packing",
        "document",
        "--sequence_length",
        "64",
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    corpus, held_out = Corpus.open(output).manifest, Corpus.open(f"{output}/validation").manifest
    assert "dropped: 1 empty, 1 control only, 1 duplicates" in printed
    assert f"1,203 read, {corpus.documents:,} to train on" in printed
    assert f"{corpus.rows:,} of up to 64 tokens, document packing" in printed
    assert f"held out   {held_out.documents} documents" in printed
    assert f"{corpus.tokens:,} in 1 shards, 0.0% of them unknown" in printed
    assert "MB/s" in printed
    assert main(arguments) == 0
    assert f"corpus {output} was complete already" in capsys.readouterr().out


def test_unknown_tokens_and_bad_records_are_told(
    wordpiece: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny.write_jsonl(
        tmp_path / "a.jsonl", [f"{text} ภาษา ไทย" for text in tiny.texts(50, words=(5, 6))]
    )
    path.write_text(path.read_text() + "{}\n")
    arguments = [str(path), "--tokenizer", str(wordpiece), "--output", str(tmp_path / "corpus")]
    assert main([*arguments, "--on_bad_record", "skip", "--num_workers", "1"]) == 0
    printed = capsys.readouterr()
    assert re.search(r"tokens .* shards, \d\d\.\d% of them unknown", printed.out)
    assert re.search(r"warning: \d\d% of the tokens are unknown to the tokenizer of .*wordpiece", printed.err)
    assert "dropped: 0 empty, 0 control only, 0 duplicates, 1 bad" in printed.out
    assert "note: 1 bad records were left out. The first: " in printed.err


def test_rows_longer_than_the_models_positions_are_refused(wordpiece: Path, tmp_path: Path) -> None:
    shutil.copytree(wordpiece, tmp_path / "model")
    BertConfig(max_position_embeddings=128).save_pretrained(tmp_path / "model")
    tiny.write_jsonl(tmp_path / "a.jsonl", tiny.texts(20))
    arguments = [str(tmp_path / "a.jsonl"), "--tokenizer", str(tmp_path / "model"), "--num_workers", "1"]
    arguments += ["--output", str(tmp_path / "corpus"), "--sequence_length"]
    with pytest.raises(
        UserError, match=r"--sequence_length 99999999999: .* has 128 positions\. Give 128 or less"
    ):
        main([*arguments, "99999999999"])
    assert not (tmp_path / "corpus").exists()
    assert main([*arguments, "128"]) == 0


def test_markers_are_told(wordpiece: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(wordpiece)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<GENE>", "<\x1b[2J>"]})
    tokenizer.save_pretrained(tmp_path / "marked")
    tiny.write_jsonl(tmp_path / "a.jsonl", [f"the <GENE> of [MASK] number {n}" for n in range(40)])
    arguments = [str(tmp_path / "a.jsonl"), "--tokenizer", str(tmp_path / "marked"), "--num_workers", "1"]
    assert main([*arguments, "--output", str(tmp_path / "corpus"), "--validation_share", "0"]) == 0
    assert (
        r"note: 2 special tokens of the tokenizer (<GENE>, <\x1b[2J>) are tokens where they stand"
        in capsys.readouterr().err
    )
    corpus = Corpus.open(tmp_path / "corpus")
    ids = [int(i) for row in corpus.rows(range(len(corpus))) for i in row]
    assert ids.count(tokenizer.convert_tokens_to_ids("<GENE>")) == 40
    assert ids.count(tokenizer.mask_token_id) == 0
    maskable = sum(i not in tokenizer.all_special_ids for i in ids)
    assert corpus.manifest.maskable == maskable


def test_rows_longer_than_the_tokenizer_states_are_noted(
    wordpiece: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(wordpiece)
    tokenizer.model_max_length = 100
    tokenizer.save_pretrained(tmp_path / "short")
    tiny.write_jsonl(tmp_path / "a.jsonl", tiny.texts(20))
    arguments = [str(tmp_path / "a.jsonl"), "--tokenizer", str(tmp_path / "short"), "--num_workers", "1"]
    main([*arguments, "--output", str(tmp_path / "corpus")])
    assert "note: --sequence_length 164 is above 100" in capsys.readouterr().err
    main([*arguments, "--output", str(tmp_path / "fits"), "--sequence_length", "100"])
    assert "note" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokenizer", "t"], r"the following arguments are required: INPUT, --output\. See --help"),
        (
            ["x", "--tokenizer", "t", "--output", "o", "--packin", "chunk"],
            r"unknown option --packin\. Did you mean --packing\? See --help",
        ),
        (
            ["x", "--tokenizer", "t", "--output", "o", "--packing", "bins"],
            r"argument --packing: invalid choice",
        ),
        (["x", "--tokenizer", "t", "--output", "o", "--array_task", "3"], r"'3' is not of the form i/N"),
    ],
)
def test_arguments_that_do_not_parse(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(arguments)
