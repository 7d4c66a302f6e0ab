"""KL to the base: on general text, the model is held to what the starting model predicted there."""

from collections.abc import Sequence

import torch

from dga_scale.backbone.flops import ModelFlops
from dga_scale.config.methods.kl import KLSettings
from dga_scale.corpus.loading.batches import StepShape
from dga_scale.objectives.method import ForwardOutput, Method, Term
from dga_scale.objectives.methods.rehearsal import weighted_means
from dga_scale.preservation.divergence import kl_divergence


class KL(Method[KLSettings]):
    """``L_MLM(D) + weight T^2 KL(softmax(base / T) || softmax(student / T)) + mlm_weight L_MLM(G)``.

    G are the rows that are mixed in (``--mix``). The divergence is one of distributions over the vocabulary,
    at the masked positions of G's masked text, averaged over those of the global batch; the base is the
    frozen starting model in eval mode. It runs on the mix's rows only.
    """

    Settings = KLSettings
    compares_vocabulary = True
    needs_mix = True
    needs_teacher = True

    def token_weights(self, labels_per_source: Sequence[int]) -> tuple[float, ...]:
        return weighted_means(labels_per_source, self.settings.kl_mlm_weight)

    def terms(self, output: ForwardOutput) -> dict[str, Term]:
        inputs, counts, temperature = output.inputs, output.counts, self.settings.kl_temperature
        mixed = sum(counts.labels_per_source[1:])
        if not mixed:  # in the whole step, on every rank
            return {}
        rows, labels, tokens = inputs.mixed_rows, inputs.mixed_label_indices, inputs.input_ids.shape[1]
        hidden = output.teacher(True, rows)  # (G, T, H)
        # Padding is a label index of -1: it takes whatever the last one holds, and doesn't count.
        positions, student = inputs.positions[labels], output.lm_logits[labels]  # (K,), (K, V)
        own = torch.searchsorted(rows, positions // tokens).clamp(max=len(rows) - 1)  # among the G rows
        base = output.teacher_logits(hidden, own * tokens + positions % tokens)  # (K, V)
        divergences = kl_divergence(base.float() / temperature, student.float() / temperature)  # (K,)
        total = divergences.masked_fill(labels < 0, 0).sum()
        mean = total * temperature**2 * (counts.num_micro_batches / mixed)
        return {"kl": Term(mean, self.settings.kl_weight)}

    def term_flops(self, model: ModelFlops, step: StepShape) -> float:
        mixed = sum(step.labels_per_source[1:])
        if not mixed:
            return 0.0
        trunk = sum(model.forward.trunk(rows.mixed, length) for length, rows in step.rows_by_length.items())
        return trunk + model.forward.head(mixed)
