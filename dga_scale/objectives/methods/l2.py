"""L2: the LM loss, with every weight drawn back to where it was (Rongali et al., arXiv 2004.02288)."""

from dataclasses import dataclass
from typing import ClassVar

from dga_scale.config.settings import AT_LEAST_0, MethodSettings, Rules, setting
from dga_scale.objectives.method import Method
from dga_scale.preservation.anchors import AnchorPlan


@dataclass(frozen=True)
class L2Settings(MethodSettings):
    """The pull."""

    l2_weight: float = setting(
        0.1,
        "lambda of the penalty (lambda / 2) * sum of squared distances from the starting weights. Its pull "
        "on a weight that moved by d is lambda * d; gradients of a pretrained model are about 1e-4.",
    )

    rules: ClassVar[Rules] = {"l2_weight": AT_LEAST_0}


class L2(Method):
    """``L_MLM + (lambda / 2) sum_i (theta_i - theta0_i)^2``, theta0 the starting weights.

    The penalty is a loss term: its gradient joins the data's before AdamW, which weight decay would not, and
    after clipping (see ``preservation.anchors``).
    """

    name = "l2"
    summary = "MLM + an L2 pull of all weights to the starting model (Rongali et al., 2020)"
    Settings = L2Settings

    def anchor(self) -> AnchorPlan:
        return AnchorPlan(self.settings.l2_weight)
