"""Rehearsal: general text is trained on beside the domain's (Rongali et al., arXiv 2004.02288)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dga_scale.config.settings import AT_LEAST_0, MethodSettings, Rules, setting
from dga_scale.objectives.method import Method


@dataclass(frozen=True)
class RehearsalSettings(MethodSettings):
    """How much the general text counts."""

    rehearsal_weight: float | None = setting(
        None,
        "alpha of L_MLM(domain) + alpha * L_MLM(general), each a mean over its own masked tokens. Default: "
        "all masked tokens count alike, so the share of the mix decides.",
    )

    rules: ClassVar[Rules] = {"rehearsal_weight": AT_LEAST_0}


class Rehearsal(Method):
    """The LM loss on the domain and on what is mixed into it, all mixed corpora taken together.

    With a weight, a global batch without a masked token of general text has no general loss: with a small
    share, take global batches large enough to hold some.
    """

    name = "rehearsal"
    summary = "MLM on the domain and on general text (--mix), optionally weighted (Rongali et al., 2020)"
    Settings = RehearsalSettings
    needs_mix = True

    def token_weights(self, labels_per_source: Sequence[int]) -> tuple[float, ...]:
        if self.settings.rehearsal_weight is None:
            return super().token_weights(labels_per_source)
        return weighted_means(labels_per_source, self.settings.rehearsal_weight)


def weighted_means(labels_per_source: Sequence[int], weight: float) -> tuple[float, ...]:
    """Token weights of ``L(source 0) + weight * L(all other sources)``, each L a mean over its tokens.

    Args:
        labels_per_source: labels of the global batch.
        weight: of the other sources.

    """
    domain, *others = labels_per_source
    return (1 / max(1, domain), *(weight / max(1, sum(others)) for _ in others))
