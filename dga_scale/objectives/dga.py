"""DGA: adapting a language model while preserving its general knowledge (Ke et al., EMNLP 2022)."""

from dataclasses import dataclass
from typing import ClassVar

from dga_scale.config import ABOVE_0, AT_LEAST_0, Rules, setting
from dga_scale.objectives.contrast import contrastive_loss
from dga_scale.objectives.method import LM_VIEW, Method, Reading, Term
from dga_scale.objectives.protected import ProtectionSettings
from dga_scale.objectives.views import View, mean_pool


@dataclass(frozen=True)
class DGASettings(ProtectionSettings):
    """Importance, soft-mask and contrast."""

    contrastive_weight: float = setting(1.0, "Lambda, the weight of the contrastive loss. Source: DGA.")
    temperature: float = setting(0.05, "Temperature of the contrastive loss. Source: DGA.")

    rules: ClassVar[Rules] = {
        **ProtectionSettings.rules,
        "contrastive_weight": AT_LEAST_0,
        "temperature": ABOVE_0,
    }


class DGA(Method):
    """The LM loss, and a contrast of full knowledge with general knowledge.

    Two ungated readings of the clean text, apart by their dropout draws, are the positive pair; the reading
    whose units are gated by their protection, and all other examples, are the negatives. A weight of 0 leaves
    those readings out.
    """

    name = "dga"
    summary = "MLM + contrast of full with general knowledge, soft-masked attention heads (Ke et al., 2022)"
    Settings = DGASettings
    gathered_keys = 2
    kinds: ClassVar[tuple[str, ...]] = ("heads",)

    def views(self) -> tuple[View, ...]:
        if self.settings.contrastive_weight == 0:
            return (LM_VIEW,)
        return LM_VIEW, View("full"), View("full_plus"), View("general", gated=True)

    def terms(self, reading: Reading) -> dict[str, Term]:
        if self.settings.contrastive_weight == 0:
            return {}
        u, v, w = (
            mean_pool(reading.hidden[name], reading.inputs.attention_mask)
            for name in ("full", "full_plus", "general")
        )
        loss = contrastive_loss(u, v, w, self.settings.temperature)
        return {"contrastive": Term(loss, self.settings.contrastive_weight)}
