"""L2: the LM loss, with L2-SP regularisation of every weight (Rongali et al., arXiv 2004.02288)."""

from dga_scale.config.methods.l2 import L2Settings
from dga_scale.objectives.method import Method
from dga_scale.preservation.weight_regularisation import WeightRegularisation


class L2(Method[L2Settings]):
    """``L_MLM + (lambda / 2) sum_i (theta_i - theta0_i)^2``, theta0 the starting weights.

    The penalty is a loss term: its gradient joins the data's before AdamW, which weight decay would not, and
    after clipping (see ``preservation.weight_regularisation``).
    """

    Settings = L2Settings

    def weight_regularisation(self) -> WeightRegularisation:
        return WeightRegularisation(self.settings.l2_weight)
