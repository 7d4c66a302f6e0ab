"""Settings of ``--method kl``."""

from dataclasses import dataclass
from typing import ClassVar

from dga_scale.config.declaration import ABOVE_0, AT_LEAST_0, setting
from dga_scale.config.settings import MethodSettings


@dataclass(frozen=True)
class KLSettings(MethodSettings):
    """The weights and the temperature of the divergence."""

    name: ClassVar = "kl"
    summary: ClassVar = "MLM + KL to the starting model's predictions on general text (--mix)"

    kl_weight: float = setting(
        1.0, "Weight of the divergence from the starting model on the mix's rows.", rule=AT_LEAST_0
    )
    kl_temperature: float = setting(
        1.0,
        "Temperature of both distributions; the divergence has its square as a factor.",
        rule=ABOVE_0,
    )
    kl_mlm_weight: float = setting(
        0.0, "Weight of the mix's own MLM loss. 0: only the divergence.", rule=AT_LEAST_0
    )
