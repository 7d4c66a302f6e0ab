"""A small world for tests of the whole program: made-up text in two domains, a tiny BERT, sharded corpora."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
VOCABULARY = 400
GENERAL = (
    "the", "river", "town", "people", "saw", "a", "long", "winter", "road", "and", "built", "houses", "near",
    "old", "water", "mills", "by", "hand",
)  # fmt: skip
DOMAIN = (
    "the", "model", "parser", "token", "graph", "learns", "deep", "neural", "layers", "and", "scores",
    "attention", "heads", "near", "loss",
)  # fmt: skip


@dataclass(frozen=True)
class SmallWorld:
    """Folders: a model, raw text files, and corpora sharded from them (rows of 32 tokens)."""

    model: Path
    domain_text: Path
    general_text: Path
    corpus: Path
    general_corpus: Path


def write_text(path: Path, words: Sequence[str], documents: int, seed: int) -> Path:
    """Sentences of a fixed grammar: each word is drawn near the last one, so there is something to learn."""
    draw = random.Random(seed)
    with open(path, "w", encoding="utf-8") as stream:
        for number in range(documents):
            at, text = draw.randrange(len(words)), []
            for _ in range(draw.randrange(20, 60)):
                text.append(words[at])
                at = (at + draw.choice([1, 1, 1, 2, 5])) % len(words)
            stream.write(json.dumps({"text": " ".join(text), "id": number}) + "\n")
    return path


def make_tokenizer(files: list[Path]) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of the letters and the most frequent words in ``files``.

    Put together here, as a trainer breaks ties by random hashes: ids would change with each process.
    """
    split = pre_tokenizers.Whitespace()
    text = "\n".join(file.read_text(encoding="utf-8") for file in files).lower()
    counts = Counter(word for word, _ in split.pre_tokenize_str(text))
    letters, words = sorted(set("".join(counts))), sorted(counts, key=lambda word: (-counts[word], word))
    entries = [*SPECIAL.values(), *letters, *(f"##{letter}" for letter in letters), *words]
    vocabulary = {entry: i for i, entry in enumerate(list(dict.fromkeys(entries))[:VOCABULARY])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def make_model(folder: Path, tokenizer: PreTrainedTokenizerFast, *, positions: int = 64) -> Path:
    """A random BERT of 2 layers and 4 heads with its tokenizer, as a Hugging Face folder."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=positions,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_world(root: Path) -> SmallWorld:
    """Build everything below ``root``."""
    from dga_scale.corpus.cli import main as shard

    domain = write_text(root / "domain.jsonl", DOMAIN, documents=400, seed=0)
    general = write_text(root / "general.jsonl", GENERAL, documents=200, seed=1)
    model = make_model(root / "model", make_tokenizer([domain, general]))
    shared = [
        "--tokenizer", str(model), "--sequence_length", "32", "--validation_share", "0.1",
        "--num_workers", "1",  # starting workers takes longer than the work
    ]  # fmt: skip
    for text, folder in ((domain, "corpus"), (general, "general_corpus")):
        shard([str(text), *shared, "--output", str(root / folder)])
    return SmallWorld(model, domain, general, root / "corpus", root / "general_corpus")
