"""MLM + TaCo: what the context adds to a token is alike for near tokens, and unlike in other sequences."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dga_scale.backbone.flops import ModelFlops
from dga_scale.config.methods.taco import TaCoSettings
from dga_scale.config.settings import TrainConfig
from dga_scale.corpus.loading.batches import StepShape
from dga_scale.errors import UserError
from dga_scale.objectives.method import LM_VIEW, ForwardOutput, Method, MethodContext, Term
from dga_scale.objectives.views import View


class TaCo(Method[TaCoSettings]):
    """The LM loss, and a contrast of ``g = last hidden state - embedding output``, a token's context.

    For every real token of the masked text: its positive is another token of its sequence, drawn from within
    the window; its negatives are drawn, for each sequence once, from the tokens of the other sequences in the
    forward pass. Neither gets a gradient. The loss is the mean over tokens, then over sequences. What is
    drawn comes from torch's generator, which is seeded by step and rank (arXiv 2204.04163).
    """

    Settings = TaCoSettings

    def check(self, config: TrainConfig, causal: bool) -> None:
        if config.optimization.per_device_train_batch_size == 1:
            raise _no_other_sequence()

    def prepare(self, context: MethodContext) -> None:
        config = context.lm.config
        width = getattr(config, "word_embed_proj_dim", config.hidden_size)
        if width != config.hidden_size:
            raise UserError(
                f"--method taco subtracts embeddings from last hidden states, which this model has of other "
                f"widths: hidden_size {config.hidden_size}, word_embed_proj_dim {width}. Take another method"
            )

    def views(self) -> tuple[View, ...]:
        return (replace(LM_VIEW, embeddings=True),)

    def terms(self, output: ForwardOutput) -> dict[str, Term]:
        settings = self.settings
        contexts = output.hidden[LM_VIEW.name].float() - output.embeddings[LM_VIEW.name].float()
        anchors = F.normalize(contexts, dim=-1)  # (B, T, H)
        keys = anchors.detach()
        lengths = output.inputs.attention_mask.sum(dim=1)  # (B,) real tokens come first
        near = near_tokens(lengths, anchors.shape[1], settings.taco_window)  # (B, T)
        positives = keys.gather(1, near.unsqueeze(-1).expand_as(keys))
        rows, tokens = tokens_of_others(lengths, settings.taco_negatives)  # (B, K) each
        negatives = keys[rows, tokens]  # (B, K, H)
        similarities = torch.cat(
            [(anchors * positives).sum(dim=-1, keepdim=True), anchors @ negatives.mT], dim=-1
        )  # (B, T, 1 + K)
        losses = -(similarities / settings.taco_temperature).log_softmax(dim=-1)[..., 0]  # (B, T)
        # A token on its own has no near token.
        counts = (output.inputs.attention_mask == 1) & (lengths > 1)[:, None]
        by_row = losses.masked_fill(~counts, 0).sum(dim=1) / counts.sum(dim=1).clamp(min=1)
        return {"taco": Term(by_row.mean(), settings.taco_weight)}

    def term_flops(self, model: ModelFlops, step: StepShape) -> float:
        tokens = sum(rows.rows * length for length, rows in step.rows_by_length.items())
        # The similarities to the negatives, and their gradient for the anchors alone.
        return 2 * 2.0 * tokens * self.settings.taco_negatives * model.hidden_size


def near_tokens(lengths: Tensor, tokens: int, window: int) -> Tensor:
    """Draw another position of its sequence for each position, at most ``window`` away.

    Args:
        lengths: (B,) the number of real tokens of each sequence.
        tokens: T; draws for positions behind a sequence's end mean nothing.
        window: The farthest distance.

    Returns:
        (B, T) positions.

    """
    here = torch.arange(tokens, device=lengths.device)
    last = (lengths[:, None] - 1).clamp(min=0)  # (B, 1)
    first = (here - window).clamp(min=0).minimum(last)  # (B, T)
    others = (here + window).minimum(last) - first  # one more is in the window: the position itself
    near = first + _below(others)
    return (near + (near >= here).long()).minimum(last)


def tokens_of_others(lengths: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draw ``count`` tokens for each sequence from the real tokens of all others, with replacement.

    Args:
        lengths: (B,) the number of real tokens of each sequence.
        count: K.

    Returns:
        The drawn tokens' sequences and their positions in those, (B, K) each.

    Raises:
        UserError: There is no other sequence.

    """
    if len(lengths) < 2:
        raise _no_other_sequence()
    ends = lengths.cumsum(0)  # of the sequences, laid one behind the other without padding
    starts = ends - lengths
    drawn = _below((ends[-1] - lengths)[:, None].expand(-1, count))
    drawn = drawn + torch.where(drawn >= starts[:, None], lengths[:, None], 0)  # skips the own sequence
    rows = torch.searchsorted(ends, drawn, right=True).clamp(max=len(lengths) - 1)
    return rows, drawn - starts[rows]


def _below(limits: Tensor) -> Tensor:
    """Draw an integer from 0 to below each limit; 0 where that is 0."""
    uniform = torch.rand(limits.shape, device=limits.device, dtype=torch.float64)
    return (uniform * limits).long()


def _no_other_sequence() -> UserError:
    return UserError(
        "--method taco draws its negatives from the other sequences of a forward pass, and "
        "--per_device_train_batch_size 1 leaves one sequence in it: set it to 2 or more"
    )
