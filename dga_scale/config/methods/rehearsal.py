"""Settings of ``--method rehearsal``."""

from dataclasses import dataclass
from typing import ClassVar

from dga_scale.config.declaration import AT_LEAST_0, setting
from dga_scale.config.settings import MethodSettings


@dataclass(frozen=True)
class RehearsalSettings(MethodSettings):
    """The weight of the general text."""

    name: ClassVar = "rehearsal"
    summary: ClassVar = (
        "MLM on the domain and on general text (--mix), optionally weighted (Rongali et al., 2020)"
    )

    rehearsal_weight: float | None = setting(
        None,
        "Alpha of L_MLM(domain) + alpha * L_MLM(general), each a mean over its own masked tokens. Default: "
        "all masked tokens count alike, so the share of the mix decides.",
        rule=AT_LEAST_0,
    )
