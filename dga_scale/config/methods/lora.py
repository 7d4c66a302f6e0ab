"""Settings of ``--method lora``."""

from dataclasses import dataclass
from typing import ClassVar

from dga_scale.config.declaration import ABOVE_0, AT_LEAST_1, BELOW_1, setting
from dga_scale.config.settings import MethodSettings


@dataclass(frozen=True)
class LoRASettings(MethodSettings):
    """The low-rank matrices."""

    name: ClassVar = "lora"
    summary: ClassVar = (
        "MLM that trains low-rank changes of projections only, merged at the end (Hu et al., 2021)"
    )

    lora_rank: int = setting(8, "Rank of the change of a projection.", rule=AT_LEAST_1, source="LoRA")
    lora_alpha: float = setting(
        16.0, "The change is multiplied by this over the rank.", rule=ABOVE_0, source="LoRA"
    )
    lora_dropout: float = setting(0.0, "Dropout of what the low-rank matrices read.", rule=BELOW_1)
    lora_targets: list[str] | None = setting(
        None,
        "Projections that are changed. One that holds several of them (GPT-2's) is changed as a whole. "
        "Default: query key value output.",
        ("query", "key", "value", "output", "up", "down"),
    )
