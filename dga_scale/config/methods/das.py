"""Settings of ``--method das``."""

from dataclasses import dataclass
from typing import ClassVar

from dga_scale.config.declaration import setting
from dga_scale.config.methods.dga import DGASettings


@dataclass(frozen=True)
class DASSettings(DGASettings):
    """DGA's, and what was important before this domain."""

    name: ClassVar = "das"
    summary: ClassVar = (
        "DGA in a sequence of domains: heads and FFN units, importance carried on (Ke et al., 2023)"
    )

    prior_importance: list[str] | None = setting(
        None,
        "Files of importances measured before, of general knowledge and of the domains learnt: a unit is "
        "protected by the largest. A run over several --corpus fills it in. Default: none, a first domain, "
        "and general knowledge's importance is measured by proxy KL.",
        refers="file",
    )
