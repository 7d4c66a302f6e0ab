"""DAS: continual pre-training over a sequence of domains (Ke et al., ICLR 2023)."""

from dga_scale.config.methods.das import DASSettings
from dga_scale.objectives.methods.dga import DGA


class DAS(DGA):
    """DGA on heads and the FFN's units (``--protect``); what a domain needs protects it later.

    The contrast's gated view and the masks take the largest protection that general knowledge or any
    earlier domain gives a unit. After training, the units' importance for this domain is measured by the
    MLM loss and saved.
    """

    Settings = DASSettings
    measures_after = True
