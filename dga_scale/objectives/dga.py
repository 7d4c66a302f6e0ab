"""DGA: adapting a language model while preserving its general knowledge (Ke et al., EMNLP 2022)."""

from collections.abc import Mapping

from torch import Tensor

from dga_scale.objectives.contrast import contrastive_loss
from dga_scale.objectives.method import LM_VIEW, Method, Term
from dga_scale.objectives.views import ModelInputs, View, mean_pool


class DGA(Method):
    """The LM loss, and a contrast of full knowledge with general knowledge.

    Two ungated readings of the clean text, apart by their dropout draws, are the positive pair; the reading
    whose heads are gated by their protection, and all other examples, are the negatives. A weight of 0 leaves
    those readings out.
    """

    needs_importance = True

    def views(self) -> tuple[View, ...]:
        if self.settings.contrastive_weight == 0:
            return (LM_VIEW,)
        return LM_VIEW, View("full"), View("full_plus"), View("general", gated=True)

    def terms(self, hidden: Mapping[str, Tensor], inputs: ModelInputs) -> dict[str, Term]:
        if self.settings.contrastive_weight == 0:
            return {}
        u, v, w = (
            mean_pool(hidden[name], inputs.attention_mask) for name in ("full", "full_plus", "general")
        )
        loss = contrastive_loss(u, v, w, self.settings.temperature)
        return {"contrastive": Term(loss, self.settings.contrastive_weight)}
