"""Regularise weights towards their starting values: all alike (L2-SP) or by their Fisher information (EWC).

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
"""A fragment's key: the parameter's name, and where in the flattened parameter the fragment starts."""


def key_of(fragment: Fragment) -> FragmentKey:
    """Return the key by which a fragment is found again among those of later steps."""
    return fragment.name, fragment.start


@dataclass(frozen=True)
class WeightRegularisation:
    """The weight regularisation that a method asks for.

    Attributes:
        weight: The factor lambda.
        fisher_samples: The number of rows of general text that F is measured on; None: F = 1.
        normalize: Whether F is scaled to mean 1.

    """

    weight: float
    fisher_samples: int | None = None
    normalize: bool = True


class WeightPenalty:
    """The penalty on a rank's fragments for leaving the values that they have now.

    It holds theta0 (and F) for these fragments only, in fp32 on their device. Weights that no optimizer steps
    are in no fragment and stay out of it.

    Clipping comes before: it bounds the gradient of the data, not that of the penalty, so the step is
    taken on ``clip(g_data) + weight F (theta - theta0)``, and the gradient norm that is logged is the data's.

    Args:
        fragments: This rank's fragments; their values become theta0.
        weight: The factor lambda.
        fisher: F of each fragment, fp32 (n,); None: 1 everywhere.
        copies: The number of ranks that hold each entry (ZeRO-0: all of them; else 1).

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
        """Add the penalty's gradient to a fragment's (n,), in place; an unknown fragment's stays as it is."""
        difference = self._difference(fragment)
        if difference is None:
            return
        if self._fisher is None:
            gradient.add_(difference, alpha=self.weight)
        else:
            gradient.addcmul_(self._fisher[key_of(fragment)], difference, value=self.weight)

    @torch.no_grad()
    def penalty(self, fragments: Sequence[Fragment], reduce: Reduce) -> float:
        """Return the penalty's value over the whole model. It communicates: every rank has to call it.

        Args:
            fragments: This rank's fragments, as they are now.
            reduce: The function that sums over ranks.

        """
        device = fragments[0].values.device if fragments else torch.device("cpu")
        total = torch.zeros((), dtype=torch.float64, device=device)  # read once, at the end
        for fragment in fragments:
            difference = self._difference(fragment)
            if difference is not None:
                squares = difference.square_()
                if self._fisher is not None:
                    squares *= self._fisher[key_of(fragment)]
                total += squares.sum(dtype=torch.float64).to(device)
        return self.weight / 2 * float(reduce(total)) / self._copies

    def bytes_per_rank(self) -> int:
        """Return the memory of theta0 and F on this rank: 4 or 8 bytes an entry of its fragments."""
        kept = [*self._start.values(), *(self._fisher or {}).values()]
        return sum(values.numel() * values.element_size() for values in kept)

    def _difference(self, fragment: Fragment) -> Tensor | None:
        start = self._start.get(key_of(fragment))
        return None if start is None else fragment.values.float() - start
