"""Settings of ``--method adapted_deit``."""

from dataclasses import dataclass
from typing import ClassVar

from dga_scale.config.declaration import AT_LEAST_0, setting
from dga_scale.config.settings import MethodSettings


@dataclass(frozen=True)
class AdaptedDeiTSettings(MethodSettings):
    """The distillation token."""

    name: ClassVar = "adapted_deit"
    summary: ClassVar = (
        "MLM + a distillation token that learns the starting model's pooled states (DGA's baseline)"
    )

    deit_weight: float = setting(
        1.0, "Weight of the distillation token's loss.", rule=AT_LEAST_0, source="DGA's baseline"
    )
