"""Rehearsal: general text is trained on beside the domain's (Rongali et al., arXiv 2004.02288)."""

from collections.abc import Sequence

from dga_scale.config.methods.rehearsal import RehearsalSettings
from dga_scale.objectives.method import Method


class Rehearsal(Method[RehearsalSettings]):
    """The LM loss on the domain and on what is mixed into it, all mixed corpora taken together.

    With a weight, a global batch without a masked token of general text has no general loss: with a small
    share, take global batches large enough to hold some.
    """

    Settings = RehearsalSettings
    needs_mix = True

    def token_weights(self, labels_per_source: Sequence[int]) -> tuple[float, ...]:
        if self.settings.rehearsal_weight is None:
            return super().token_weights(labels_per_source)
        return weighted_means(labels_per_source, self.settings.rehearsal_weight)


def weighted_means(labels_per_source: Sequence[int], weight: float) -> tuple[float, ...]:
    """Return the token weights of ``L(source 0) + weight * L(all others)``, each L a mean over its tokens.

    Args:
        labels_per_source: The number of labels of the global batch, by source.
        weight: The weight of the other sources.

    """
    domain, *others = labels_per_source
    return (1 / max(1, domain), *(weight / max(1, sum(others)) for _ in others))
