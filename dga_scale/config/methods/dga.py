"""Settings of ``--method dga``."""

from dataclasses import dataclass
from typing import ClassVar

from dga_scale.config.declaration import ABOVE_0, AT_LEAST_0, setting
from dga_scale.config.methods.shared import ContrastSettings, ProtectionSettings


@dataclass(frozen=True)
class DGASettings(ContrastSettings, ProtectionSettings):
    """Importance, soft-mask and contrast."""

    name: ClassVar = "dga"
    summary: ClassVar = (
        "MLM + contrast of full with general knowledge, soft-masked attention heads (Ke et al., 2022)"
    )

    contrastive_weight: float = setting(
        1.0, "Lambda, the weight of the contrastive loss.", rule=AT_LEAST_0, source="DGA"
    )
    temperature: float = setting(0.05, "Temperature of the contrastive loss.", rule=ABOVE_0, source="DGA")
    contrast_views: str = setting(
        "paper",
        "Views of a batch. paper: the LM loss's, of masked text, and of clean text two full ones and a "
        "general one; shared: the LM loss's is one of the full ones too, three views instead of four. "
        "That departs from the paper, which contrasts clean text only (a causal LM masks nothing).",
        ("paper", "shared"),
    )
