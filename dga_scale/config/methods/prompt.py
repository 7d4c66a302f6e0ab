"""Settings of ``--method prompt``."""

from dataclasses import dataclass
from typing import ClassVar

from dga_scale.config.declaration import AT_LEAST_1, setting
from dga_scale.config.settings import MethodSettings


@dataclass(frozen=True)
class PromptSettings(MethodSettings):
    """The soft tokens."""

    name: ClassVar = "prompt"
    summary: ClassVar = "MLM that trains soft tokens only (Lester et al., 2021)"

    prompt_tokens: int = setting(
        100,
        "Soft tokens before every text; the model has so many positions less.",
        rule=AT_LEAST_1,
        source="Lester et al.",
    )
