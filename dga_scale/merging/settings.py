"""Which formula merges models; without torch, for the command line."""

import math
from dataclasses import dataclass

from dga_scale.errors import UserError

METHODS = ("linear", "slerp", "ties")


@dataclass(frozen=True)
class MergeSettings:
    """The formula of a merge, and its weight between the base (0) and the adapted models (1).

    Raises:
        UserError: The method is unknown, or a number is out of its range.
    """

    method: str = "linear"
    weight: float = 0.5
    density: float = 0.2
    """The share of each task vector's entries that TIES keeps. Source: Yadav et al., section 5."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"--method {self.method}: must be one of {', '.join(METHODS)}.")
        top = math.inf if self.method == "ties" else 1.0
        if not (0 <= self.weight <= top and math.isfinite(self.weight)):
            rule = "0 or more" if self.method == "ties" else "from 0 (the base) to 1 (the adapted model)"
            raise UserError(f"--weight {self.weight:g} with --method {self.method}: must be {rule}.")
        if not 0 < self.density <= 1:
            raise UserError(f"--density {self.density:g}: must be above 0 and at most 1.")
