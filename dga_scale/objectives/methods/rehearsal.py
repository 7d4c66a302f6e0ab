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

    def token_weights(self, masked: Sequence[int]) -> tuple[float, ...]:
        if self.settings.rehearsal_weight is None:
            return super().token_weights(masked)
        return weighted_means(masked, self.settings.rehearsal_weight)


def weighted_means(masked: Sequence[int], weight: float) -> tuple[float, ...]:
    """Token weights of ``L(source 0) + weight * L(all other sources)``, each L a mean over its tokens.

    Args:
        masked: labels of the global batch, by source.
        weight: of the other sources.

    """
    domain, general = max(1, masked[0]), max(1, sum(masked[1:]))
    return (1 / domain, *(weight / general for _ in masked[1:]))
