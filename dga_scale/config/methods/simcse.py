"""Settings of ``--method simcse``."""

from dataclasses import dataclass
from typing import ClassVar

from dga_scale.config.declaration import ABOVE_0, AT_LEAST_0, setting
from dga_scale.config.methods.shared import ContrastSettings


@dataclass(frozen=True)
class SimCSESettings(ContrastSettings):
    """The contrast of sentences."""

    name: ClassVar = "simcse"
    summary: ClassVar = "MLM + contrast of two dropout draws of a sentence with all others (Gao et al., 2021)"

    simcse_weight: float = setting(1.0, "Weight of the contrast.", rule=AT_LEAST_0, source="DGA's baseline")
    simcse_temperature: float = setting(0.05, "Temperature of the contrast.", rule=ABOVE_0, source="SimCSE")
