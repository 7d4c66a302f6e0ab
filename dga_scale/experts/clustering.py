"""Cluster a text sample by DBSCAN, with eps from the k-distance elbow."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dga_scale.errors import UserError

MAX_EXPERTS = 64
MIN_SAMPLES, MIN_SAMPLES_SHARE = 5, 0.005
_QUANTILES = tuple(percent / 100 for percent in range(95, 20, -5))
"""The quantiles of the k-distances that are tried for eps after the elbow."""
_RADIUS_FLOOR = 1e-3
"""The smallest radius over eps: with radius 0 a cluster of equal points would never take another point."""

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Clusters:
    """The clusters that DBSCAN found.

    Attributes:
        centres: The mean of each cluster's points, (clusters, d).
        radii: The mean distance of a cluster's points from its centre, (clusters,).
        labels: The cluster of each point, (N,); noise is assigned to the cluster with the nearest centre,
            which it does not change.
        noise: The number of points that DBSCAN left out.
        eps: DBSCAN's eps.
        min_samples: DBSCAN's min_samples.
    """

    centres: Array
    radii: Array
    labels: NDArray[np.int64]
    noise: int
    eps: float
    min_samples: int

    @property
    def sizes(self) -> list[int]:
        """The number of points of each cluster, its noise included."""
        return np.bincount(self.labels, minlength=len(self.centres)).tolist()


class NoClusters(UserError):
    """The points form fewer than two clusters, or too many."""


def find_clusters(
    points: Array, eps: float | None = None, min_samples: int | None = None, *, what: str = "the sample"
) -> Clusters:
    """Cluster points (N, d), largest cluster first.

    Args:
        points: The points, fp32.
        eps: DBSCAN's eps; None: the elbow of the k-distance curve, or, where that joins all points, the
            largest of the curve's 95% to 25% quantiles that gives two clusters.
        min_samples: DBSCAN's min_samples; None: max(5, 0.5% of N).
        what: The points' name in messages.

    Raises:
        UserError: There are too few points for min_samples.
        NoClusters: There are fewer than two clusters or more than ``MAX_EXPERTS``; the message names values
            of eps that give another number, where there are any.
    """
    needed = min_samples or max(MIN_SAMPLES, round(MIN_SAMPLES_SHARE * len(points)))
    if len(points) < 2 * needed:
        raise UserError(
            f"{len(points)} sequences of {what} are too few for two clusters of --cse_min_samples {needed}: "
            "raise --cse_samples or lower --cse_min_samples"
        )
    distances = k_distances(points, needed)
    used = eps or elbow(distances)
    labels = _dbscan(points, used, needed)
    first = used, _count(labels)
    lower = (float(np.quantile(distances, quantile)) for quantile in _QUANTILES)
    candidates = [] if eps else [candidate for candidate in lower if 0 < candidate < used]
    while not 2 <= _count(labels) <= MAX_EXPERTS:
        if not candidates:
            raise NoClusters(_advice(points, distances, what, *first, needed, given=eps is not None))
        used = candidates.pop(0)
        labels = _dbscan(points, used, needed)
    found = _count(labels)
    members = [points[labels == label] for label in np.argsort(-np.bincount(labels[labels >= 0]))]
    centres = np.stack([each.mean(axis=0) for each in members])
    radii = np.array(
        [np.linalg.norm(each - centre, axis=1).mean() for each, centre in zip(members, centres, strict=True)]
    )
    order = np.empty(found + 1, dtype=np.int64)
    order[np.argsort(-np.bincount(labels[labels >= 0]))] = np.arange(found)
    nearest = np.linalg.norm(points[:, None] - centres, axis=-1).argmin(axis=1)
    return Clusters(
        centres=centres.astype(np.float32),
        radii=np.maximum(radii, _RADIUS_FLOOR * used).astype(np.float32),
        labels=np.where(labels >= 0, order[labels], nearest),
        noise=int((labels < 0).sum()),
        eps=float(used),
        min_samples=needed,
    )


def k_distances(points: Array, k: int) -> NDArray[np.float64]:
    """Compute each point's distance to its k-th neighbour (itself counted, as in DBSCAN); ascending (N,)."""
    from sklearn.neighbors import NearestNeighbors

    distances, _ = NearestNeighbors(n_neighbors=k).fit(points).kneighbors(points)
    return np.sort(distances[:, -1]).astype(np.float64)


def elbow(ascending: NDArray[np.float64]) -> float:
    """Find the value of an ascending curve that lies farthest below the line from its first to its last.

    Both axes are scaled to [0, 1] first (Satopaa et al., 2011).
    """
    rise = ascending[-1] - ascending[0]
    if rise == 0:
        return float(ascending[0])
    below = np.linspace(0, 1, len(ascending)) - (ascending - ascending[0]) / rise
    return float(ascending[below.argmax()])


def _dbscan(points: Array, eps: float, min_samples: int) -> NDArray[np.int64]:
    """Label points (N, d) by cluster; -1: noise."""
    from sklearn.cluster import DBSCAN

    labels: NDArray[np.int64] = DBSCAN(eps=eps, min_samples=min_samples).fit_predict(points)
    return labels


def _count(labels: NDArray[np.int64]) -> int:
    return int(labels.max()) + 1


def _advice(
    points: Array,
    distances: NDArray[np.float64],
    what: str,
    eps: float,
    found: int,
    min_samples: int,
    *,
    given: bool,
) -> str:
    """Describe what to change; where eps was given, with the numbers of clusters of other values."""
    useful = []
    for quantile in _QUANTILES[::3] if given else ():
        candidate = float(f"{np.quantile(distances, quantile):.3g}")
        count = _count(_dbscan(points, candidate, min_samples)) if candidate > 0 else 0
        useful += [f"{candidate:g} ({count} clusters)"] * (2 <= count <= MAX_EXPERTS)
    clusters = "one cluster" if found == 1 else f"{found} clusters"
    tried = "eps" if given else "the elbow, eps"
    advice = (
        f"Give --cse_eps {' or '.join(useful)}."
        if useful
        else "Smaller values of eps do not help: lower --cse_min_samples, train on more varied text (for "
        "example with --mix GENERAL:0.3), or leave the sublayer out with --cse_experts or --cse_layers."
    )
    return (
        f"DBSCAN finds {clusters} in {len(points)} sequences of {what} ({tried} {eps:.4g}, min_samples "
        f"{min_samples}); experts need from 2 to {MAX_EXPERTS}. {advice}"
    )
