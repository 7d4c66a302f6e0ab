"""Settings of ``--method mlm``: it has none of its own."""

from dataclasses import dataclass
from typing import ClassVar

from dga_scale.config.settings import MethodSettings


@dataclass(frozen=True)
class MLMSettings(MethodSettings):
    """No settings."""

    name: ClassVar = "mlm"
    summary: ClassVar = "plain masked (or causal) LM: DAPT, domain-adaptive pre-training"
