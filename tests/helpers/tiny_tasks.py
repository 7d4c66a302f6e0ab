"""A task that a tiny model can learn: which of two kinds of word a text is made of."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing

from tests.helpers.small import DOMAIN, GENERAL, make_model, make_tokenizer, write_text


def tiny_model(root: Path, name: str = "model") -> Path:
    """A random BERT whose tokenizer knows the task's words, and puts [CLS] and [SEP] around texts."""
    texts = [
        write_text(root / f"{name}-{n}.jsonl", words, 60, n) for n, words in enumerate((DOMAIN, GENERAL))
    ]
    tokenizer = make_tokenizer(texts)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in ("[CLS]", "[SEP]")],
    )
    return make_model(root / name, tokenizer)


def examples(
    count: int, seed: int = 0, words: Sequence[Sequence[str]] = (DOMAIN, GENERAL)
) -> list[dict[str, Any]]:
    """Texts of 6 words that only one of the two lists has, labelled by their list."""
    draw = random.Random(seed)
    own = [sorted(set(words[0]) - set(words[1])), sorted(set(words[1]) - set(words[0]))]
    names = ("science", "town")
    return [
        {"text": " ".join(draw.choices(own[n % 2], k=draw.randint(3, 6))), "label": names[n % 2]}
        for n in range(count)
    ]


def write_split(file: Path, lines: Sequence[Any]) -> None:
    file.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))


def write_task(folder: Path, train: int = 48, dev: int = 0, test: int = 24) -> Path:
    """A task's folder with splits of these sizes; 0: no such file."""
    folder.mkdir(parents=True)
    for seed, (name, count) in enumerate((("train", train), ("dev", dev), ("test", test))):
        if count:
            write_split(folder / f"{name}.jsonl", examples(count, seed))
    return folder
