"""MLM + TaCL: tokens' states on masked text are drawn to the starting model's on the clean text."""

import torch.nn.functional as F

from dga_scale.backbone.flops import ModelFlops
from dga_scale.config.methods.tacl import TaCLSettings
from dga_scale.config.settings import TrainConfig
from dga_scale.corpus.loading.batches import StepShape
from dga_scale.corpus.loading.masking import IGNORED
from dga_scale.errors import UserError
from dga_scale.objectives.method import LM_VIEW, ForwardOutput, Method, Term, teacher_flops


class TaCL(Method[TaCLSettings]):
    """The LM loss, and a contrast of each masked token with the tokens of its sequence.

    ``-log( e^{cos(s_i, t_i)/tau} / sum_j e^{cos(s_i, t_j)/tau} )`` for each masked position i: s the states
    of the masked text, t those of the clean text in the frozen starting model, j over the real tokens of the
    sequence. The mean over all masked positions of the global batch (arXiv 2111.04198).
    """

    Settings = TaCLSettings
    needs_teacher = True

    def check(self, config: TrainConfig, causal: bool) -> None:
        if causal:
            raise UserError(
                "--method tacl contrasts masked with clean text, and a causal LM masks nothing: choose "
                "another method (kd distills the starting model into a causal LM too)"
            )

    def terms(self, output: ForwardOutput) -> dict[str, Term]:
        inputs = output.inputs
        students = F.normalize(output.hidden[LM_VIEW.name].float(), dim=-1)  # (B, T, H)
        teachers = F.normalize(output.teacher(False).float(), dim=-1)  # (B, T, H)
        # Of all tokens, then those masked: less than the teachers' states of a row for each of its tokens.
        similarities = (students @ teachers.mT).flatten(0, 1)[inputs.positions]  # (N, T)
        similarities = similarities / self.settings.tacl_temperature
        similarities = similarities.masked_fill(inputs.attention_mask[inputs.label_rows] == 0, float("-inf"))
        tokens = inputs.positions % inputs.input_ids.shape[1]
        targets = tokens.masked_fill(inputs.labels == IGNORED, IGNORED)
        total = F.cross_entropy(similarities, targets, ignore_index=IGNORED, reduction="sum")
        mean = total * (output.counts.num_micro_batches / output.counts.num_labels)
        return {"tacl": Term(mean, self.settings.tacl_weight)}

    def term_flops(self, model: ModelFlops, step: StepShape) -> float:
        pairs = sum(rows.rows * length**2 for length, rows in step.rows_by_length.items())
        # The similarities, and their gradient for the student's states alone.
        return teacher_flops(model, step) + 2 * 2.0 * pairs * model.hidden_size
