"""MLM + KD: the vocabulary distributions of the starting model are distilled into the one that is trained."""

from dga_scale.backbone.flops import ModelFlops
from dga_scale.config.methods.kd import KDSettings
from dga_scale.corpus.loading.batches import StepShape
from dga_scale.corpus.loading.masking import IGNORED
from dga_scale.objectives.method import ForwardOutput, Method, Term, teacher_flops
from dga_scale.preservation.divergence import kl_divergence


class KD(Method[KDSettings]):
    """The LM loss, and ``T^2 KL(softmax(teacher / T) || softmax(student / T))`` over the vocabulary.

    The teacher is the frozen starting model in eval mode, on the same masked text; the divergence is taken at
    the masked positions, and its mean over those of the global batch (arXiv 1503.02531).
    """

    Settings = KDSettings
    compares_vocabulary = True
    needs_teacher = True

    def terms(self, output: ForwardOutput) -> dict[str, Term]:
        positions, labels = output.inputs.positions, output.inputs.labels
        temperature = self.settings.kd_temperature
        teacher = output.teacher_logits(output.teacher(True), positions).float() / temperature  # (N, V)
        divergences = kl_divergence(teacher, output.lm_logits.float() / temperature)  # (N,)
        total = divergences.masked_fill(labels == IGNORED, 0).sum()
        mean = total * temperature**2 * (output.counts.num_micro_batches / output.counts.num_labels)
        return {"kd": Term(mean, self.settings.kd_weight)}

    def term_flops(self, model: ModelFlops, step: StepShape) -> float:
        return teacher_flops(model, step) + model.forward.head(step.num_labels)
