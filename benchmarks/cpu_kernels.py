"""A training pass on a CPU with torch's dropout and attention, and with ours.

    python benchmarks/cpu_kernels.py DATA [--shape minilm|roberta-base] [--rounds 7]

DATA as for ``steps.py``. Forward and backward of the trunk in bf16 on one core: 16 rows of 128 tokens, as one
view has; 64, all four views of DGA; and without dropout, as most causal LMs are. Both take turns on the same
rows in one process. Processor time, in which a process that waits for a core does not count, and the ratio of
each turn. The table is appended to RESULTS.md.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
from results import append_section
from steps import prepare, spread
from torch import nn

from dga_scale.backbone.anatomy import Anatomy
from dga_scale.backbone.cpu_kernels import use_cpu_kernels
from dga_scale.backbone.loading import load_model

LENGTH = 128


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--shape", choices=["minilm", "roberta-base"], default="minilm")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    options.text = "packed"
    folder, _ = prepare(options)
    torch.set_num_threads(1)
    lines = ["| rows | dropout | torch, s | ours, s | ours / torch |", "|---" * 5 + "|"]
    for dropout in (None, 0.0):
        loaded = load_model(str(folder), dropout=dropout)
        models = [loaded.model.bfloat16().train(), copy.deepcopy(loaded.model)]
        use_cpu_kernels(models[1])
        for rows in options.rows:
            ids = torch.randint(1000, loaded.config.vocab_size, (rows, LENGTH))
            turns = [
                [seconds(model, loaded.anatomy, ids) for model in models] for _ in range(options.rounds + 1)
            ]
            torchs, ours = zip(*turns[1:], strict=True)
            ratios = [a / b for a, b in zip(ours, torchs, strict=True)]
            cells = [
                str(rows),
                "none" if dropout == 0 else "the model's",
                *(spread(list(c)) for c in (torchs, ours, ratios)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    title = f"Dropout and attention on a CPU, {options.shape}"
    command = " ".join(["python", "benchmarks/cpu_kernels.py", *sys.argv[1:]])
    append_section(title, "\n".join(lines), command)


def seconds(model: nn.Module, anatomy: Anatomy, ids: torch.Tensor) -> float:
    """Processor time of one pass forward and back."""
    started = time.process_time()
    trunk = anatomy.trunk(model)
    hidden = trunk(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    hidden.float().square().mean().backward()
    taken = time.process_time() - started
    model.zero_grad(set_to_none=True)
    return taken


if __name__ == "__main__":
    main()
