"""Anchors: weights that are drawn back to where they were, alike (L2) or by what general text needs (EWC).

The penalty of Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks" (2017), as used for
continual domain-tuning by Rongali et al. (arXiv 2004.02288):

    (weight / 2) sum_i F_i (theta_i - theta0_i)^2,   F = 1 for L2

theta0 and F lie beside the shard that a rank's optimizer steps, so they are spread over ranks as its moments
are. The gradient of the penalty is added there, in fp32, right before the step: it is exact in every
precision and costs no communication.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dga_scale.preservation.fragments import Fragment, Reduce

FragmentKey = tuple[str, int]
"""Name of the parameter, and where in the flattened parameter the fragment starts."""


def key_of(fragment: Fragment) -> FragmentKey:
    """Find a fragment again among those of later steps."""
    return fragment.name, fragment.start


@dataclass(frozen=True)
class AnchorPlan:
    """What a method asks for.

    Attributes:
        weight: lambda.
        fisher_samples: rows of general text that F is measured on; None: F = 1.
        normalize: scale F to mean 1.

    """

    weight: float
    fisher_samples: int | None = None
    normalize: bool = True


class Anchor:
    """Draws the weights of a rank's fragments back to what they are now.

    Holds theta0 (and F) for these fragments only, in fp32 on their device. Weights that no optimizer steps
    are in no fragment and stay out of it.

    Clipping comes before: it bounds the gradient of the data, not the pull of the anchor, so the step is
    taken on ``clip(g_data) + weight F (theta - theta0)``, and the gradient norm that is logged is the data's.

    Args:
        fragments: of this rank; their values are the anchor's.
        weight: lambda.
        fisher: F of each fragment, fp32 (n,); None: 1 everywhere.
        copies: ranks that hold each entry (ZeRO-0: all of them; else 1).

    """

    def __init__(
        self,
        fragments: Sequence[Fragment],
        weight: float,
        fisher: Mapping[FragmentKey, Tensor] | None = None,
        copies: int = 1,
    ) -> None:
        self.weight = weight
        self._copies = copies
        self._start = {key_of(f): f.values.detach().float().clone() for f in fragments}
        self._fisher = None if fisher is None else {key: fisher[key] for key in self._start}

    @torch.no_grad()
    def add_gradient(self, fragment: Fragment, gradient: Tensor) -> None:
        """Add the penalty's gradient to that of a fragment (n,), in place; strangers are left alone."""
        moved = self._moved(fragment)
        if moved is None:
            return
        if self._fisher is None:
            gradient.add_(moved, alpha=self.weight)
        else:
            gradient.addcmul_(self._fisher[key_of(fragment)], moved, value=self.weight)

    @torch.no_grad()
    def penalty(self, fragments: Sequence[Fragment], reduce: Reduce) -> float:
        """Value of the penalty over the whole model. Communicates; every rank has to call it.

        Args:
            fragments: of this rank, as they are now.
            reduce: sums over ranks.

        """
        device = fragments[0].values.device if fragments else torch.device("cpu")
        total = torch.zeros((), dtype=torch.float64, device=device)  # read once, at the end
        for fragment in fragments:
            moved = self._moved(fragment)
            if moved is not None:
                squares = moved.square_()
                if self._fisher is not None:
                    squares *= self._fisher[key_of(fragment)]
                total += squares.sum(dtype=torch.float64).to(device)
        return self.weight / 2 * float(reduce(total)) / self._copies

    def bytes_per_rank(self) -> int:
        """Memory of theta0 and F on this rank: 4 or 8 bytes an entry of its fragments."""
        kept = [*self._start.values(), *(self._fisher or {}).values()]
        return sum(values.numel() * values.element_size() for values in kept)

    def _moved(self, fragment: Fragment) -> Tensor | None:
        start = self._start.get(key_of(fragment))
        return None if start is None else fragment.values.float() - start
