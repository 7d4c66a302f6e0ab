"""L2: the LM loss, with every weight drawn back to where it was (Rongali et al., arXiv 2004.02288)."""

from dga_scale.config.methods.l2 import L2Settings
from dga_scale.objectives.method import Method
from dga_scale.preservation.anchors import AnchorPlan


class L2(Method[L2Settings]):
    """``L_MLM + (lambda / 2) sum_i (theta_i - theta0_i)^2``, theta0 the starting weights.

    The penalty is a loss term: its gradient joins the data's before AdamW, which weight decay would not, and
    after clipping (see ``preservation.anchors``).
    """

    Settings = L2Settings

    def anchor(self) -> AnchorPlan:
        return AnchorPlan(self.settings.l2_weight)
