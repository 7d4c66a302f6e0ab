"""What is measured on: models of the two RoBERTa shapes with random weights, and a corpus of made-up words.

Everything is made on the spot, without a network. Speed does not depend on what the weights are; the words
follow a Zipf-like law, so that the embeddings' gradient meets frequent and rare rows as in a language.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from dga_scale.corpus.cli import main as shard
from dga_scale.corpus.shards import Corpus

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
"""RoBERTa's, with its ids; ``<mask>`` is the last of its vocabulary."""


@dataclass(frozen=True)
class Scale:
    """How large all of it is: the papers' sizes, or a smoke test's.

    Attributes:
        shapes: RoBERTa configurations by name, without what depends on the tokenizer.
        vocabulary: of the tokenizer and the models.
        sequence_length: of every row.
        global_batch: rows in an optimizer step.
        micro_batches: rows in a pass that are tried, upward, by whether there are the four views of DGA.
        documents: of the corpus; some rows each.
        steps, rounds, warm_up: a figure is the median of ``rounds`` averages over ``steps`` steps.
        importance_rows: over which the importance pass is timed.
        stages: of ZeRO, that DGA is tried with beside stage 2.
        program_steps: of the real program, and of the Trainer.

    """

    shapes: dict[str, dict[str, Any]]
    vocabulary: int
    sequence_length: int
    global_batch: int
    micro_batches: dict[str, tuple[int, ...]]
    documents: int
    steps: int
    rounds: int
    warm_up: int
    importance_rows: int
    stages: tuple[int, ...]
    program_steps: int


def _shape(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
    }


PAPERS = Scale(
    shapes={"roberta-base": _shape(12, 768, 12), "roberta-large": _shape(24, 1024, 16)},
    vocabulary=50_265,
    sequence_length=164,
    global_batch=256,
    micro_batches={"mlm": (32, 64, 128, 256), "dga": (16, 32, 64, 128, 256)},
    documents=4096,
    steps=5,
    rounds=4,
    warm_up=4,
    importance_rows=1024,
    stages=(0, 1),
    program_steps=40,
)
SMOKE = Scale(
    shapes={"tiny": _shape(2, 32, 4)},
    vocabulary=200,
    sequence_length=16,
    global_batch=8,
    micro_batches={"mlm": (4, 8), "dga": (8,)},
    documents=64,
    steps=1,
    rounds=2,
    warm_up=1,
    importance_rows=16,
    stages=(0,),
    program_steps=2,
)


@dataclass(frozen=True)
class World:
    """Folders of the corpus and of each shape's model."""

    folder: Path
    scale: Scale
    models: dict[str, Path] = field(default_factory=dict)

    @property
    def corpus(self) -> Path:
        """Rows of ``sequence_length`` tokens, none padded."""
        return self.folder / "corpus"


def make_world(folder: Path, scale: Scale, shapes: list[str]) -> World:
    """Make everything below ``folder``, or find it there from an earlier run."""
    world = World(folder, scale, {shape: folder / shape for shape in shapes})
    tokenizer = make_tokenizer(scale.vocabulary)
    for shape, path in world.models.items():
        if not (path / "tokenizer.json").exists():  # saved last
            torch.manual_seed(0)
            config = RobertaConfig(
                vocab_size=scale.vocabulary,
                max_position_embeddings=max(514, scale.sequence_length + 2),
                type_vocab_size=1,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                **scale.shapes[shape],
            )
            RobertaForMaskedLM(config).save_pretrained(path)
            tokenizer.save_pretrained(path)
    text = folder / "text.jsonl"
    write_text(text, scale)
    shard([
        str(text), "--tokenizer", str(next(iter(world.models.values()))), "--output", str(world.corpus),
        "--sequence_length", str(scale.sequence_length), "--validation_share", "0", "--num_workers", "1",
    ])  # fmt: skip
    rows = len(Corpus.open(world.corpus))
    assert rows >= scale.global_batch, f"{rows} rows are less than a batch of {scale.global_batch}"
    return world


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose every id but the special ones is a word: w0, w1, ..."""
    words = [*SPECIAL, *(f"w{n}" for n in range(vocabulary - len(SPECIAL) - 1)), "<mask>"]
    ids = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), trim_offsets=False, add_prefix_space=False
    )
    names = ("bos_token", "pad_token", "eos_token", "unk_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="<s>",
        sep_token="</s>",
        mask_token="<mask>",
        **dict(zip(names, SPECIAL, strict=True)),
    )


def write_text(path: Path, scale: Scale) -> None:
    """Documents about as long as a row, of words whose frequency falls as one over their rank."""
    draw = np.random.default_rng(0)
    words = scale.vocabulary - len(SPECIAL) - 1
    with open(path, "w", encoding="utf-8") as stream:
        for number in range(scale.documents):
            length = int(draw.integers(scale.sequence_length, 2 * scale.sequence_length))
            ranks = np.floor(words ** draw.random(length)).astype(int) - 1
            stream.write(json.dumps({"id": number, "text": " ".join(f"w{rank}" for rank in ranks)}) + "\n")
