"""Tiny tokenizers and texts, made on the spot."""

import json
import random
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_SENTENCE = (
    "the model of language domain adapts weights heads gradient importance mask token corpus shard rank step "
    "learning keeps knowledge general protein café naïve 語 data attention layer batch 3 2024 loss, end. "
    "contrast sequence encoder decoder über noise signal"
)
WORDS = _SENTENCE.split()


def texts(count: int, seed: int = 0, words: tuple[int, int] = (1, 40)) -> list[str]:
    """Make ``count`` different documents of a few words each."""
    generator = random.Random(seed)
    return [
        f"{number} " + " ".join(generator.choices(WORDS, k=generator.randint(*words)))
        for number in range(count)
    ]


def write_jsonl(path: Path, documents: list[str], field: str = "text") -> Path:
    """A document a line."""
    path.write_text("".join(json.dumps({field: text, "id": i}) + "\n" for i, text in enumerate(documents)))
    return path


def wordpiece(folder: Path) -> Path:
    """A BERT-like tokenizer with mask, CLS and SEP."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts(300), trainer)
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), special, strict=True))
    return _save(tokenizer, folder, {f"{name}_token": token for name, token in names.items()})


def byte_bpe(folder: Path) -> Path:
    """A GPT-2-like tokenizer: an end-of-text token and no mask."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(300), trainer)
    return _save(tokenizer, folder, {"eos_token": "<|endoftext|>"})


def slow_sentencepiece(folder: Path) -> Path:
    """A sentencepiece model that transformers runs without the tokenizers library (BertGeneration)."""
    folder.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts(300)),
        model_prefix=str(folder / "spiece"),
        vocab_size=200,
        hard_vocab_limit=False,
        pad_id=3,
        minloglevel=2,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertGenerationTokenizer"}))
    return folder


def fast_sentencepiece(folder: Path) -> Path:
    """A sentencepiece model as XLM-R's, which transformers converts for the tokenizers library."""
    slow_sentencepiece(folder)
    (folder / "spiece.model").rename(folder / "sentencepiece.bpe.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "XLMRobertaTokenizer"}))
    return folder


def _save(tokenizer: Tokenizer, folder: Path, special: dict[str, str]) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder
