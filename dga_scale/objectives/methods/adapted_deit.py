"""MLM + AdaptedDeiT: a distillation token learns what the starting model says of a text."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dga_scale.backbone.flops import ModelFlops
from dga_scale.backbone.peft.prompt import embedding_std
from dga_scale.config.methods.adapted_deit import AdaptedDeiTSettings
from dga_scale.corpus.loading.batches import StepShape
from dga_scale.objectives.method import ForwardOutput, Method, MethodContext, Term, teacher_flops
from dga_scale.objectives.views import mean_pool


class DistillationToken(nn.Module):
    """The embedding of a token that stands behind the last one of every text.

    Args:
        size: The embeddings' size H.
        std: The standard deviation of its first, random values.
        dtype: The dtype of the weight; ZeRO-3 in bf16 needs that of the model, which it has loaded in bf16.

    """

    def __init__(self, size: int, std: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype).normal_(std=std))

    def forward(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        """Put the token at ``positions`` (B,) of embeddings (B, T, H), in place of what is there."""
        here = torch.arange(embeddings.shape[1], device=positions.device) == positions[:, None]  # (B, T)
        return torch.where(here.unsqueeze(-1), self.weight.to(embeddings.dtype), embeddings)


class AdaptedDeiT(Method[AdaptedDeiTSettings]):
    """The LM loss, and ``1 - cos`` of the distillation token's last state and the teacher's pooled state.

    The token stands behind the last token of the clean text, in a forward pass of its own: a causal model
    sees the whole text there, no token of the text changes its position, and neither the LM loss nor the
    evaluation sees a text with a token that the end task won't have. A text that fills all positions of the
    model gives up its last token to it. The teacher, the frozen starting model, gets the clean text without
    it. The token is dropped after training. A reconstruction: DGA's authors name the method (after DeiT,
    arXiv 2012.12877) and publish no code for it.
    """

    Settings = AdaptedDeiTSettings
    needs_teacher = True

    def prepare(self, context: MethodContext) -> None:
        lm: Any = context.lm
        size = lm.get_input_embeddings().embedding_dim
        self.token = DistillationToken(size, embedding_std(lm), lm.dtype)
        self.max_positions = context.anatomy.max_positions

    def terms(self, output: ForwardOutput) -> dict[str, Term]:
        inputs, trunk = output.inputs, output.trunk
        size = min(inputs.input_ids.shape[1] + 1, self.max_positions)
        positions = inputs.attention_mask.sum(dim=1).clamp(max=size - 1)  # (B,)
        embeddings = trunk.get_input_embeddings()(inputs.input_ids)
        embeddings = F.pad(embeddings, (0, 0, 0, 1))[:, :size]  # (B, size, H)
        mask = (torch.arange(size, device=positions.device) <= positions[:, None]).long()
        hidden = trunk(inputs_embeds=self.token(embeddings, positions), attention_mask=mask).last_hidden_state
        at = positions[:, None, None].expand(-1, 1, hidden.shape[-1])
        states = hidden.gather(1, at).squeeze(1).float()  # (B, H)
        teachers = mean_pool(output.teacher(False), inputs.attention_mask)
        losses = 1 - F.cosine_similarity(states, teachers, dim=-1)
        return {"adapted_deit": Term(losses.mean(), self.settings.deit_weight)}

    def term_flops(self, model: ModelFlops, step: StepShape) -> float:
        students = sum(
            model.from_embeddings.trunk(rows.rows, min(length + 1, self.max_positions))
            for length, rows in step.rows_by_length.items()
        )
        return students + teacher_flops(model, step)
