"""How far a soft-mask lets the query rows of a head move, on the gradient and on the update.

    python -m benchmarks.experiments.soft_mask_movement [--steps 100] [--learning_rate 5e-5] [--epsilon 1e-8]

A random RoBERTa of 3 layers learns made-up text by masked LM and plain AdamW, in one process, three times
from the same weights and batches: without a mask, with it on the gradient, with it on the update. Heads have
1 - a = 1, 0.5, 0.1 and 0.01 in turn. What is printed is the movement of each kind of head over its movement
without a mask. Adam undoes a mask on the gradient as far as gradients are large beside its epsilon, so their
size is printed too.
"""

from typing import TYPE_CHECKING

from benchmarks.common import keep_section, options_of, table

if TYPE_CHECKING:
    from torch import Tensor

FACTORS = (1.0, 0.5, 0.1, 0.01)
LAYERS, HEADS, WIDTH, VOCABULARY, MASK = 3, 12, 192, 1000, 4


def batch(step: int, rows: int = 16, tokens: int = 64) -> "tuple[Tensor, Tensor]":
    """Make text in which each word follows from the last, and labels at 15% of its positions, masked."""
    import torch

    generator = torch.Generator().manual_seed(step)
    first = torch.randint(5, VOCABULARY, (rows, 1), generator=generator)
    strides = torch.randint(1, 4, (rows, tokens - 1), generator=generator).cumsum(dim=1)
    ids = torch.cat([first, (first + strides - 5) % (VOCABULARY - 5) + 5], dim=1)
    masked = torch.rand(rows, tokens, generator=generator) < 0.15
    return ids.masked_fill(masked, MASK), ids.masked_fill(~masked, -100)


def movement(soft_mask: str, steps: int, learning_rate: float, epsilon: float) -> "tuple[Tensor, float]":
    """Return the movement (layers, heads) of the query rows and their median |gradient| on the way."""
    import torch
    from transformers import RobertaConfig, RobertaForMaskedLM

    from dga_scale.preservation.protection import Protection

    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=80,
    )
    lm = RobertaForMaskedLM(config).train()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=learning_rate, eps=epsilon, weight_decay=0)
    protection = Protection(lm, soft_mask=soft_mask)
    protection.attach(optimizer)
    protection.set({"heads": 1 - torch.tensor(FACTORS).repeat(LAYERS, HEADS // len(FACTORS))})
    queries = [p for n, p in lm.named_parameters() if n.endswith("query.weight")]
    sizes = []
    for step in range(steps):
        ids, labels = batch(step)
        optimizer.zero_grad()
        lm(input_ids=ids, labels=labels).loss.backward()
        sizes.append(torch.stack([p.grad for p in queries if p.grad is not None]).abs().median())
        optimizer.step()
    return protection.effective()["heads"].movement, torch.stack(sizes).median().item()


def main() -> None:
    """Measure all three ways and compare."""
    options = vars(options_of(__doc__, data=False, steps=100, learning_rate=5e-5, epsilon=1e-8))
    free, size = movement("none", **options)
    rows = [["1 - a", *(f"{factor:g}" for factor in FACTORS)]]
    for name in ("gradient", "update"):
        relative = (movement(name, **options)[0] / free).view(LAYERS, -1, len(FACTORS)).mean(dim=(0, 1))
        rows.append([f"mask on the {name}", *(f"{share:.3f}" for share in relative)])
    said = f"Without a mask the median |gradient| of the query weights is {size:.1g}."
    keep_section("Movement of query rows under a soft-mask", f"{table(rows)}\n\n{said}")


if __name__ == "__main__":
    main()
