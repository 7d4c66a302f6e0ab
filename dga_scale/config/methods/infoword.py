"""Settings of ``--method infoword``."""

from dataclasses import dataclass
from typing import ClassVar

from dga_scale.config.declaration import ABOVE_0, AT_LEAST_0, setting
from dga_scale.config.methods.shared import ContrastSettings


@dataclass(frozen=True)
class InfoWordSettings(ContrastSettings):
    """The contrast of sentences and words."""

    name: ClassVar = "infoword"
    summary: ClassVar = "MLM + contrast of the masked sentence with its masked words (Kong et al., 2020)"

    infoword_weight: float = setting(
        1.0,
        "Weight of the contrast of sentences and words.",
        rule=AT_LEAST_0,
        source="DGA's baseline",
    )
    infoword_temperature: float = setting(
        0.05,
        "Temperature of the contrast of sentences and words.",
        rule=ABOVE_0,
        source="DGA's baseline",
    )
