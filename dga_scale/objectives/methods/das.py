"""DAS: continual pre-training over a sequence of domains (Ke et al., ICLR 2023)."""

from dataclasses import dataclass

from dga_scale.config.settings import setting
from dga_scale.objectives.methods.dga import DGA, DGASettings


@dataclass(frozen=True)
class DASSettings(DGASettings):
    """DGA's, and what was important before this domain."""

    prior_importance: list[str] | None = setting(
        None,
        "Files of importances measured before, of general knowledge and of the domains learnt: a unit is "
        "protected by the largest. A run over several --corpus fills it in. Default: none, a first domain, "
        "and general knowledge's importance is measured by proxy KL.",
    )


class DAS(DGA):
    """DGA on attention heads, intermediate units and FFN outputs; what each domain needs protects it later.

    The contrast's gated reading and the masks take the largest protection that general knowledge or any
    earlier domain gives a unit. After training, the units' importance for this domain is measured by the
    MLM loss and saved.
    """

    name = "das"
    summary = "DGA in a sequence of domains: heads and FFN units, importance carried on (Ke et al., 2023)"
    Settings = DASSettings
    kinds = ("heads", "ffn_intermediate", "ffn_output")
    measures_after = True
