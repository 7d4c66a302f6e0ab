"""Settings of ``--method l2``."""

from dataclasses import dataclass
from typing import ClassVar

from dga_scale.config.declaration import AT_LEAST_0, setting
from dga_scale.config.settings import MethodSettings


@dataclass(frozen=True)
class L2Settings(MethodSettings):
    """The penalty."""

    name: ClassVar = "l2"
    summary: ClassVar = (
        "MLM + L2 regularisation of all weights towards the starting model (Rongali et al., 2020)"
    )

    l2_weight: float = setting(
        0.1,
        "Lambda of the penalty (lambda / 2) * sum of squared distances from the starting weights. For a "
        "weight at distance d its gradient is lambda * d; gradients of a pretrained model are about 1e-4. "
        "It is added after clipping: it weighs more beside a gradient that was clipped.",
        rule=AT_LEAST_0,
    )
