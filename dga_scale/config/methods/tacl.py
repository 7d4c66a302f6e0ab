"""Settings of ``--method tacl``."""

from dataclasses import dataclass
from typing import ClassVar

from dga_scale.config.declaration import ABOVE_0, AT_LEAST_0, setting
from dga_scale.config.settings import MethodSettings


@dataclass(frozen=True)
class TaCLSettings(MethodSettings):
    """The contrast of tokens."""

    name: ClassVar = "tacl"
    summary: ClassVar = (
        "MLM + contrast of masked tokens with the starting model's states of them (Su et al., 2022)"
    )

    tacl_weight: float = setting(1.0, "Weight of the contrast of tokens.", rule=AT_LEAST_0, source="TaCL")
    tacl_temperature: float = setting(
        0.01, "Temperature of the contrast of tokens.", rule=ABOVE_0, source="TaCL"
    )
