"""Settings of ``--method adapter``."""

from dataclasses import dataclass
from typing import ClassVar

from dga_scale.config.declaration import AT_LEAST_1, setting
from dga_scale.config.settings import MethodSettings


@dataclass(frozen=True)
class AdapterSettings(MethodSettings):
    """The adapters."""

    name: ClassVar = "adapter"
    summary: ClassVar = "MLM that trains bottleneck adapters only (Houlsby et al., 2019)"

    adapter_size: int = setting(64, "Width of the bottleneck.", rule=AT_LEAST_1, source="Houlsby et al.")
    adapter_activation: str = setting(
        "gelu", "What stands in the bottleneck.", ("gelu", "relu", "silu"), source="Houlsby et al."
    )
