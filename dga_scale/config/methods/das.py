"""Settings of ``--method das``."""

from dataclasses import dataclass
from typing import ClassVar

from dga_scale.config.declaration import setting
from dga_scale.config.methods.dga import DGASettings
from dga_scale.config.methods.shared import PROTECT, PriorImportanceSettings
from dga_scale.unit_kinds import UNIT_KINDS


@dataclass(frozen=True)
class DASSettings(PriorImportanceSettings, DGASettings):
    """DGA's settings, with the FFN's units protected too."""

    name: ClassVar = "das"
    summary: ClassVar = (
        "DGA in a sequence of domains: heads and FFN units, importance carried on (Ke et al., 2023)"
    )

    protect: list[str] = setting(
        ["heads", "ffn_intermediate", "ffn_output"], PROTECT, UNIT_KINDS, source="DAS"
    )
