"""What ``steps.py`` measures our steps against, each under DeepSpeed's ZeRO-2 in bf16, on the same rows.

trainer    transformers' Trainer with DataCollatorForLanguageModeling: logits of every position, a batch
           padded to its longest row, as run_mlm.py does.
plain_dga  DGA written down naively: a pass of the whole model for each view, logits of every position in
           all of them, masks on the gradient.

Started by ``steps.py`` through the deepspeed launcher, and by ``benchmarks.gpu``. Rank 0 writes the seconds
of all steps but the first to steps.json in its --output_dir.
"""

import argparse
import importlib
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.common import ROOT
from dga_scale.backbone.gates import Gates
from dga_scale.backbone.loading import load_model
from dga_scale.corpus.loading.batches import Batch
from dga_scale.corpus.loading.masking import MaskingPolicy
from dga_scale.corpus.loading.mixture import Mixture
from dga_scale.corpus.loading.streams import BatchStream
from dga_scale.corpus.shards import Corpus
from dga_scale.corpus.tokenizer import load_tokenizer
from dga_scale.objectives.contrast import contrastive_loss
from dga_scale.objectives.views import mean_pool
from dga_scale.preservation.soft_mask import GradientMask, mask_factors

DS_CONFIG = ROOT / "ds_configs" / "zero2.json"
LEARNING_RATE = 1e-4


class Clock(TrainerCallback):
    """The clock that notes when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def trainer(options: argparse.Namespace) -> list[float]:
    """Return the ends of the Trainer's steps."""
    arguments = TrainingArguments(
        output_dir=options.output_dir,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=LEARNING_RATE,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        deepspeed=str(DS_CONFIG),
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    clock, corpus = Clock(), Corpus.open(options.corpus)
    Trainer(
        model=AutoModelForMaskedLM.from_pretrained(options.model, dtype=torch.float32),
        args=arguments,
        train_dataset=[{"input_ids": corpus.row(row).tolist()} for row in range(len(corpus))],
        data_collator=DataCollatorForLanguageModeling(load_tokenizer(options.model), mlm_probability=0.15),
        callbacks=[clock],
    ).train()
    return clock.ends


class PlainDGA(nn.Module):
    """The model of DGA with four passes of the whole model, one after the other."""

    def __init__(self, name: str) -> None:
        super().__init__()
        loaded = load_model(name)
        self.lm, self.anatomy = loaded.model.train(), loaded.anatomy
        self.gates = Gates(self.lm, self.anatomy)
        self.protection = torch.rand(self.anatomy.num_layers, self.anatomy.num_heads)
        self.mask = GradientMask(self.lm.named_parameters(), self.anatomy, ("heads",))
        self.mask.set(mask_factors(self.anatomy, {"heads": self.protection}, "min"))

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        clean, attention_mask = batch.input_ids, batch.attention_mask
        # Label indices that only fill up are of position 0, which is a CLS without a label.
        labels = torch.full_like(clean, -100).flatten().scatter(0, batch.positions, batch.labels)
        logits = self.lm(input_ids=batch.masked_ids, attention_mask=attention_mask).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels)
        pooled: list[Tensor] = []
        gate = self.protection.to(clean.device).expand(len(clean), -1, -1)
        for gated in (False, False, True):
            self.gates.set({"heads": gate} if gated else None)
            output = self.lm(input_ids=clean, attention_mask=attention_mask, output_hidden_states=True)
            pooled.append(mean_pool(output.hidden_states[-1], attention_mask))
        self.gates.set(None)
        return loss + contrastive_loss(pooled[0], pooled[1], pooled[2], 0.05)


def plain_dga(options: argparse.Namespace) -> list[float]:
    """Return the ends of the steps of DGA as one would write it down first, in the shortest loop there is."""
    deepspeed.init_distributed(verbose=False)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    config = json.loads(DS_CONFIG.read_text(encoding="utf-8"))
    del config["train_batch_size"], config["fp16"]
    config |= {  # in place of "auto"
        "train_micro_batch_size_per_gpu": options.batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
    }
    model = PlainDGA(options.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    corpus = Corpus.open(options.corpus)
    stream = BatchStream(
        Mixture([corpus], [], 42),
        MaskingPolicy.for_corpus(corpus, 0.15),
        global_batch_size=options.batch_size * world_size,
        micro_batch_size=options.batch_size,
        rank=rank,
        world_size=world_size,
        start_step=0,
        num_steps=options.steps,
        pack=True,
    )
    ends = []
    with stream:
        for step in stream:
            engine.backward(engine(step.micro_batches[0].to(engine.device)))
            engine.step()
            ends.append(time.perf_counter())
    return ends


SYSTEMS = {"trainer": trainer, "plain_dga": plain_dga}


def main() -> None:
    """Run one system on this rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=list(SYSTEMS))
    for name in ("model", "corpus", "output_dir"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("steps", "batch_size"):  # of one rank
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    # DeepSpeed would compile a shared-memory operation for CPUs, which only inference calls: 40 s.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    torch.manual_seed(42)
    ends = SYSTEMS[options.system](options)
    if torch.distributed.get_rank() == 0:
        path = Path(options.output_dir, "steps.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([b - a for a, b in pairwise(ends)]), encoding="utf-8")
    torch.distributed.destroy_process_group()  # or gloo's threads may abort the process at its end


if __name__ == "__main__":
    main()
