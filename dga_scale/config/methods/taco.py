"""Settings of ``--method taco``."""

from dataclasses import dataclass
from typing import ClassVar

from dga_scale.config.declaration import ABOVE_0, AT_LEAST_0, AT_LEAST_1, setting
from dga_scale.config.settings import MethodSettings


@dataclass(frozen=True)
class TaCoSettings(MethodSettings):
    """The contrast of contexts."""

    name: ClassVar = "taco"
    summary: ClassVar = (
        "MLM + contrast of what the context adds to near and to unrelated tokens (Fu et al., 2022)"
    )

    taco_weight: float = setting(
        1.0, "Weight of the contrast of contexts.", rule=AT_LEAST_0, source="DGA's baseline"
    )
    taco_temperature: float = setting(
        0.07, "Temperature of the contrast of contexts.", rule=ABOVE_0, source="TACO"
    )
    taco_window: int = setting(
        5, "Farthest token that the positive is drawn from.", rule=AT_LEAST_1, source="TACO"
    )
    taco_negatives: int = setting(
        50, "Tokens of other sequences that a token is contrasted with.", rule=AT_LEAST_1, source="TACO"
    )
