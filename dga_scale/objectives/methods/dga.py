"""DGA: adapting a language model while preserving its general knowledge (Ke et al., EMNLP 2022)."""

from dataclasses import dataclass
from typing import ClassVar

from dga_scale.config.settings import ABOVE_0, AT_LEAST_0, Rules, setting
from dga_scale.objectives.contrast import Contrast, ContrastSettings, Side
from dga_scale.objectives.method import LM_VIEW, Method
from dga_scale.objectives.protected import ProtectionSettings
from dga_scale.objectives.views import View


@dataclass(frozen=True)
class DGASettings(ContrastSettings, ProtectionSettings):
    """Importance, soft-mask and contrast."""

    contrastive_weight: float = setting(1.0, "Lambda, the weight of the contrastive loss. Source: DGA.")
    temperature: float = setting(0.05, "Temperature of the contrastive loss. Source: DGA.")
    contrast_views: str = setting(
        "paper",
        "Readings of a batch. paper: the LM loss's, of masked text, and of clean text two full ones and a "
        "general one; shared: the LM loss's is one of the full ones too, three readings instead of four. "
        "That departs from the paper, whose contrast reads clean text only (a causal LM masks nothing).",
        ("paper", "shared"),
    )

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

    With ``contrast_views shared`` the masked reading is the anchor. As a key it would be told from the gated
    readings by its gaps; this way all keys are of clean text, and what tells an example's positive from its
    negative are the gates alone, as in the paper.
    """

    name = "dga"
    summary = "MLM + contrast of full with general knowledge, soft-masked attention heads (Ke et al., 2022)"
    Settings = DGASettings
    kinds: ClassVar[tuple[str, ...]] = ("heads",)

    def contrast(self) -> Contrast | None:
        settings = self.settings
        if settings.contrastive_weight == 0:
            return None
        full = View("full")
        pair = (LM_VIEW, full) if settings.contrast_views == "shared" else (full, View("full_plus"))
        return Contrast(
            name="contrastive",
            weight=settings.contrastive_weight,
            temperature=settings.temperature,
            scope=settings.contrast_scope,
            sides=[Side(view) for view in (*pair, View("general", gated=True))],
        )
