"""Clusters of a text sample by DBSCAN, with eps from the k-distance elbow."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dga_scale.errors import UserError

MAX_EXPERTS = 64
MIN_SAMPLES, MIN_SAMPLES_SHARE = 5, 0.005
_RADIUS_FLOOR = 1e-3
"""Least radius over eps: a cluster of equal points would never take another point."""

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Clusters:
    """What DBSCAN found.

    Attributes:
        centres: (clusters, d) mean of each cluster's points.
        radii: (clusters,) mean distance of a cluster's points from its centre.
        labels: (N,) cluster of each point; noise is given to the cluster with the nearest centre, which it
            does not change.
        noise: how many points DBSCAN left out.
        eps, min_samples: as used.

    """

    centres: Array
    radii: Array
    labels: NDArray[np.int64]
    noise: int
    eps: float
    min_samples: int

    @property
    def sizes(self) -> list[int]:
        """Number of points of each cluster, its noise included."""
        return np.bincount(self.labels, minlength=len(self.centres)).tolist()


def find_clusters(
    points: Array, eps: float | None = None, min_samples: int | None = None, *, what: str = "the sample"
) -> Clusters:
    """Cluster points (N, d), largest cluster first.

    Args:
        points: fp32.
        eps: DBSCAN's; None: the elbow of the k-distance curve.
        min_samples: DBSCAN's; None: max(5, 0.5% of N).
        what: the points' name in messages.

    Raises:
        UserError: fewer points than min_samples, less than two clusters, or more than ``MAX_EXPERTS``; it
            says which eps would do, where one would.

    """
    from sklearn.cluster import DBSCAN

    wanted = min_samples or max(MIN_SAMPLES, round(MIN_SAMPLES_SHARE * len(points)))
    if len(points) < 2 * wanted:
        raise UserError(
            f"{len(points)} sequences of {what} are too few for two clusters of --cse_min_samples {wanted}: "
            "raise --cse_samples or lower --cse_min_samples"
        )
    distances = k_distances(points, wanted)
    used = eps or elbow(distances)
    labels = DBSCAN(eps=used, min_samples=wanted).fit_predict(points)
    found = int(labels.max()) + 1
    if not 2 <= found <= MAX_EXPERTS:
        raise UserError(_advice(points, distances, what, found, used, wanted))
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
        min_samples=wanted,
    )


def k_distances(points: Array, k: int) -> NDArray[np.float64]:
    """Distance of each point to its k-th neighbour, itself counted as DBSCAN does; ascending (N,)."""
    from sklearn.neighbors import NearestNeighbors

    distances, _ = NearestNeighbors(n_neighbors=k).fit(points).kneighbors(points)
    return np.sort(distances[:, -1]).astype(np.float64)


def elbow(ascending: NDArray[np.float64]) -> float:
    """Value of the point of an ascending curve that lies farthest below the line from its first to its last.

    Both axes are scaled to [0, 1] first (Satopaa et al., 2011).
    """
    rise = ascending[-1] - ascending[0]
    if rise == 0:
        return float(ascending[0])
    below = np.linspace(0, 1, len(ascending)) - (ascending - ascending[0]) / rise
    return float(ascending[below.argmax()])


def _advice(
    points: Array, distances: NDArray[np.float64], what: str, found: int, eps: float, min_samples: int
) -> str:
    """Say what to change, with the numbers of clusters that other values of eps give."""
    from sklearn.cluster import DBSCAN

    counts = {}
    for quantile in (0.02, 0.1, 0.25, 0.5, 0.75, 0.95):
        candidate = float(f"{np.quantile(distances, quantile):.3g}")
        if candidate > 0:
            labels = DBSCAN(eps=candidate, min_samples=min_samples).fit_predict(points)
            counts[candidate] = int(labels.max()) + 1
    useful = [f"{e:g} ({n} clusters)" for e, n in counts.items() if 2 <= n <= MAX_EXPERTS]
    clusters = "one cluster" if found == 1 else f"{found} clusters"
    advice = (
        f"On this sample --cse_eps {' or '.join(useful)} would do."
        if useful
        else "No other --cse_eps gives two with this --cse_min_samples: lower it, or train on text that has "
        "parts, for example with --mix GENERAL:0.3."
    )
    return (
        f"DBSCAN finds {clusters} in {len(points)} sequences of {what} (eps {eps:.4g}, min_samples "
        f"{min_samples}); experts need from 2 to {MAX_EXPERTS}. {advice}"
    )
