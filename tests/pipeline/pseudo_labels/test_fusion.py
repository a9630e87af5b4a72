"""Greedy mask fusion, section 3.3."""

import numpy as np
import pytest

from pipeline.pseudo_labels.fusion import fuse
from tests import reference


def at_degrees(*degrees: float) -> np.ndarray:
    """(k, 2) float32 unit vectors: similarities are the cosines of the differences."""
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.5, 0.8, 0.99])
@pytest.mark.parametrize(("k", "width"), [(1, 3), (2, 2), (12, 3), (30, 8)])
def test_reference(k: int, width: int, threshold: float, seed: int) -> None:
    rng = np.random.default_rng([k, seed])
    centroids = rng.normal(size=(k, width)).astype(np.float32)
    sizes = rng.integers(0, 4, k)
    groups = fuse(centroids, sizes, threshold)
    assert groups.dtype == np.int64
    np.testing.assert_array_equal(groups, reference.fuse(centroids, sizes, threshold))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("threshold", [-1.0, -0.5, 0.0, 0.5, 1.0])
def test_exact_ties_go_to_the_smallest_index(threshold: float, seed: int) -> None:
    """Axes and their opposites have similarities -1, 0 and 1 in any precision; so has the threshold."""
    rng = np.random.default_rng(seed)
    axes = np.concatenate([np.eye(3), -np.eye(3)]).astype(np.float32)
    centroids, sizes = axes[rng.integers(0, 6, 15)], rng.integers(0, 3, 15)
    np.testing.assert_array_equal(fuse(centroids, sizes, threshold), reference.fuse(centroids, sizes, threshold))


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        ((0, 20, 45), [0, 0, 1]),  # 0-20 are closest; row 0 does not reach 45, though its neighbour 20 would
        ((0, 25, 45), [0, 0, 0]),  # 25-45 are closest; row 25 comes first and reaches 0 too ...
        ((45, 25, 0), [0, 0, 1]),  # ... but row 45 comes first here, and does not
        ((0, 36.5, 0.5), [0, 0, 0]),  # 0-0.5 are closest; row 0 reaches 36.5
        ((0, 37, 0.5), [0, 1, 0]),  # 37 is out of row 0's reach, though not of 0.5's
        ((0, 90, 5, 95, 180), [0, 1, 0, 1, 2]),
    ],
)
def test_by_hand(degrees: tuple[float, ...], expected: list[int]) -> None:
    """Threshold 0.8 is 36.87 degrees."""
    found = fuse(at_degrees(*degrees), np.ones(len(degrees)), 0.8)
    np.testing.assert_array_equal(found, reference.fuse(at_degrees(*degrees), np.ones(len(degrees)), 0.8))
    assert found.tolist() == expected


def test_merged_clusters_are_not_used_again() -> None:
    """10 apart throughout: the first row takes what it reaches, the rest begins anew."""
    assert fuse(at_degrees(0, 9, 20, 31, 42, 53), np.ones(6), 0.9).tolist() == [0, 0, 0, 1, 1, 1]


def test_similarity_at_the_threshold_is_not_above_it() -> None:
    axes = np.eye(2, dtype=np.float32)
    assert fuse(axes, np.ones(2), 0.0).tolist() == [0, 1]
    assert fuse(axes, np.ones(2), -1e-6).tolist() == [0, 0]
    assert fuse(axes[[0, 0]], np.ones(2), 1.0).tolist() == [0, 1]


def test_empty_clusters_take_no_part() -> None:
    """Cluster 0 is near both others, which are not near each other."""
    assert fuse(at_degrees(25, 0, 50), np.array([1, 3, 1]), 0.8).tolist() == [0, 0, 0]
    assert fuse(at_degrees(25, 0, 50), np.array([0, 3, 1]), 0.8).tolist() == [-1, 0, 1]
    assert fuse(at_degrees(25, 0, 50), np.zeros(3), 0.8).tolist() == [-1, -1, -1]


@pytest.mark.parametrize("threshold", [0.8, -1.0])
def test_nothing_to_fuse(threshold: float) -> None:
    assert fuse(np.zeros((0, 4), np.float32), np.zeros(0), threshold).shape == (0,)
    assert fuse(np.ones((1, 4), np.float32), np.ones(1), threshold).tolist() == [0]


def test_zero_centroids_look_like_nothing() -> None:
    centroids = np.zeros((3, 4), np.float32)
    assert fuse(centroids, np.ones(3), 0.8).tolist() == [0, 1, 2]
    np.testing.assert_array_equal(fuse(centroids, np.ones(3), -0.5), reference.fuse(centroids, np.ones(3), -0.5))
