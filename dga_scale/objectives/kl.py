"""KL to the base: on general text, the model is held to what the starting model predicted there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dga_scale.config import ABOVE_0, AT_LEAST_0, MethodSettings, Rules, setting
from dga_scale.corpus.batches import IGNORED
from dga_scale.objectives.method import Method, Reading, Term
from dga_scale.objectives.rehearsal import weighted_means
from dga_scale.preservation.divergence import kl_divergence


@dataclass(frozen=True)
class KLSettings(MethodSettings):
    """How firmly, and on what."""

    kl_weight: float = setting(1.0, "Weight of the divergence from the starting model on the mix's rows.")
    kl_temperature: float = setting(
        1.0, "Temperature of both distributions; the divergence has its square as a factor."
    )
    kl_mlm_weight: float = setting(0.0, "Weight of the mix's own MLM loss. 0: only the divergence.")

    rules: ClassVar[Rules] = {
        "kl_weight": AT_LEAST_0,
        "kl_temperature": ABOVE_0,
        "kl_mlm_weight": AT_LEAST_0,
    }


class KL(Method):
    """``L_MLM(D) + weight T^2 KL(softmax(base / T) || softmax(student / T)) + mlm_weight L_MLM(G)``.

    G are the rows that are mixed in (``--mix``). The divergence is one of distributions over the vocabulary,
    at the masked positions of G's masked text, averaged over those of the global batch; the base is the
    frozen starting model in eval mode. It reads the mix's rows only.
    """

    name = "kl"
    summary = "MLM + KL to the starting model's predictions on general text (--mix)"
    Settings = KLSettings
    compares_vocabulary = True
    needs_mix = True
    needs_teacher = True

    def token_weights(self, masked: Sequence[int]) -> tuple[float, ...]:
        return weighted_means(masked, self.settings.kl_mlm_weight)

    def terms(self, reading: Reading) -> dict[str, Term]:
        inputs, temperature = reading.inputs, self.settings.kl_temperature
        # Waits for the device, which costs less than the teacher on rows that don't count.
        rows = (inputs.sources > 0).nonzero().flatten()  # (G,)
        has_general = len(rows) > 0
        if not has_general:
            rows = rows.new_zeros(1)  # the teacher's weights may have to be gathered with the other ranks
        hidden = reading.teacher(True, rows)  # (G, T, H)
        base = reading.teacher_logits(hidden, inputs.positions[rows])  # (G, M, V)
        divergences = kl_divergence(base.float() / temperature, reading.lm_logits[rows].float() / temperature)
        counted = (inputs.labels[rows] != IGNORED) & has_general  # (G, M)
        total = divergences.masked_fill(~counted, 0).sum()
        mean = total * temperature**2 * (reading.passes / max(1, sum(reading.masked[1:])))
        return {"kl": Term(mean, self.settings.kl_weight)}
