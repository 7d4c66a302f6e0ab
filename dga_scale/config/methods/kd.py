"""Settings of ``--method kd``."""

from dataclasses import dataclass
from typing import ClassVar

from dga_scale.config.declaration import ABOVE_0, AT_LEAST_0, setting
from dga_scale.config.settings import MethodSettings


@dataclass(frozen=True)
class KDSettings(MethodSettings):
    """Distillation."""

    name: ClassVar = "kd"
    summary: ClassVar = "MLM + distillation of the starting model's token distributions (DGA's baseline)"

    kd_weight: float = setting(
        1.0, "Weight of the distillation loss.", rule=AT_LEAST_0, source="DGA's baseline"
    )
    kd_temperature: float = setting(
        2.0,
        "Temperature of both distributions; the loss has its square as a factor.",
        rule=ABOVE_0,
        source="Hinton et al.",
    )
