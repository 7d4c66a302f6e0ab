"""Clusters against blobs whose members are known, and eps against the formula of the elbow."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from dga_scale.errors import UserError
from dga_scale.experts.clustering import elbow, find_clusters, k_distances


def blobs(sizes: tuple[int, ...], spread: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian blobs in 8 dimensions, 30 apart, shuffled; points and the blob of each."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    points = 30.0 * np.eye(8)[labels] + spread * generator.normal(size=(len(labels), 8))
    return points.astype(np.float32), labels


def test_blobs_are_found_largest_first() -> None:
    points, truth = blobs((60, 300, 140))
    found = find_clusters(points)
    assert found.sizes == [300, 140, 60]
    assert np.array_equal(found.labels, np.array([2, 0, 1])[truth])
    assert found.min_samples == 5
    # Centre and radius are of the points that DBSCAN did not call noise.
    from sklearn.cluster import DBSCAN

    kept = DBSCAN(eps=found.eps, min_samples=5).fit_predict(points) >= 0
    assert found.noise == (~kept).sum()
    for cluster, blob in enumerate((1, 2, 0)):
        members = points[(truth == blob) & kept].astype(np.float64)
        centre = members.mean(axis=0)
        np.testing.assert_allclose(found.centres[cluster], centre, rtol=1e-5, atol=1e-5)
        distances = cdist(members, centre[None])
        np.testing.assert_allclose(found.radii[cluster], distances.mean(), rtol=1e-5)


def test_noise_goes_to_the_nearest_cluster_and_moves_nothing() -> None:
    points, _ = blobs((100, 100))
    without = find_clusters(points, eps=5.0)
    far = np.full((1, 8), 0.0, dtype=np.float32)
    far[0, 1] = 60.0  # beyond the second blob
    found = find_clusters(np.concatenate([points, far]), eps=5.0)
    assert found.noise == without.noise + 1
    assert found.labels[-1] == found.centres[:, 1].argmax()
    np.testing.assert_array_equal(found.centres, without.centres)
    np.testing.assert_array_equal(found.radii, without.radii)


def test_k_distance_counts_the_point_itself() -> None:
    points, _ = blobs((40, 30))
    every = np.sort(cdist(points.astype(np.float64), points.astype(np.float64)), axis=1)
    np.testing.assert_allclose(k_distances(points, 7), np.sort(every[:, 6]), rtol=1e-4)


def test_elbow_is_farthest_from_the_chord() -> None:
    """Against the distance from a line by the cross product, on a curve with a known corner."""
    curve = np.concatenate([np.linspace(1, 2, 900), np.linspace(2, 12, 100)])
    ends = np.array([[0.0, 0.0], [1.0, 1.0]])
    places = np.stack([np.linspace(0, 1, 1000), (curve - 1) / 11], axis=1)
    along = ends[1] - ends[0]
    away = along[0] * places[:, 1] - along[1] * places[:, 0]  # below the line: negative
    assert elbow(curve) == curve[away.argmin()]
    assert elbow(curve) == pytest.approx(2.0, abs=0.02)
    assert elbow(np.full(10, 3.0)) == 3.0


def test_min_samples_grow_with_the_sample() -> None:
    points, _ = blobs((1500, 700))
    assert find_clusters(points).min_samples == 11  # 0.5% of 2200
    assert find_clusters(points, min_samples=30).min_samples == 30


def test_equal_points_have_a_radius() -> None:
    points = np.repeat(np.eye(8, dtype=np.float32)[:2], 20, axis=0)
    found = find_clusters(points, eps=0.5)
    assert (found.radii > 0).all()
    assert found.sizes == [20, 20]


def test_an_elbow_that_joins_everything_gives_way_to_quantiles() -> None:
    """Heavy tails bend the curve late, at an eps that bridges the gap between two blobs."""
    generator = np.random.default_rng(0)
    truth = generator.permutation(np.repeat([0, 1], [300, 200]))
    points = 0.6 * generator.standard_t(2.5, size=(500, 8))
    points[:, 0] += 8 * truth
    points = points.astype(np.float32)
    distances = k_distances(points, 5)
    with pytest.raises(UserError, match="one cluster"):
        find_clusters(points, eps=elbow(distances))
    found = find_clusters(points)
    assert len(found.centres) == 2
    assert (found.labels == truth).mean() > 0.98
    assert found.eps in np.quantile(distances, np.arange(95, 20, -5) / 100)
    next_larger = distances[distances > found.eps][25]  # one quantile up
    with pytest.raises(UserError, match="one cluster"):
        find_clusters(points, eps=next_larger)


def test_one_cluster_is_refused_with_what_would_do() -> None:
    points, _ = blobs((200, 100))
    with pytest.raises(UserError, match=r"one cluster in 300 sequences of text .*--cse_eps .*\(2 clusters\)"):
        find_clusters(points, eps=100.0, what="text")
    alike, _ = blobs((300,))
    with pytest.raises(UserError, match=r"finds one cluster .*lower --cse_min_samples"):
        find_clusters(alike, min_samples=100)
    with pytest.raises(UserError, match="finds 0 clusters"):
        find_clusters(points, eps=1e-4)
    with pytest.raises(UserError, match="8 sequences of the sample are too few"):
        find_clusters(points[:8])
