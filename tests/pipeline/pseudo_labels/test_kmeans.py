"""Spherical K-means against a plain one that mirrors FAISS."""

import sys
from collections.abc import Callable

import faiss
import numpy as np
import pytest
import torch

from pipeline.pseudo_labels.fusion import fuse
from pipeline.pseudo_labels.kmeans import kmeans, unit_length
from tests import reference
from tests.pipeline.draws import draw_unit
from tests.reference import Array

EmptyClusters = Callable[[], int]
KMEANS = kmeans.__module__  # the package names its function like the module


def assert_reference(tokens: Array, seeds: Array, iterations: int) -> None:
    """Equal labels; equal centroids, of unit length."""
    labels, centroids = kmeans(tokens, seeds, iterations)
    wanted_labels, wanted_centroids = reference.kmeans(tokens, seeds, iterations)
    np.testing.assert_array_equal(labels, wanted_labels)
    np.testing.assert_allclose(centroids, wanted_centroids, atol=1e-9)
    assert centroids.dtype == np.float64


def by_faiss(tokens: Array, seeds: Array, iterations: int) -> tuple[Array, Array]:
    """Labels and centroids by faiss.Kmeans itself."""
    clustering = faiss.Kmeans(
        tokens.shape[1], len(seeds), niter=iterations, spherical=True, min_points_per_centroid=1,
        max_points_per_centroid=len(tokens), early_stop_threshold=-1.0,
    )  # fmt: skip
    clustering.train(tokens, init_centroids=seeds)
    return clustering.index.search(tokens, 1)[1][:, 0], clustering.centroids


@pytest.mark.parametrize("shape", [(3, 7), (4, 4, 5), (2, 512)])
def test_unit_length(shape: tuple[int, ...]) -> None:
    vectors = np.random.default_rng(0).normal(0, 30, shape).astype(np.float32)
    vectors[0] = 0
    found = unit_length(torch.from_numpy(vectors))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, reference.unit(vectors), atol=1e-7)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("n", "k", "width"), [(2, 1, 3), (40, 7, 3), (300, 20, 16), (600, 80, 64)])
@pytest.mark.parametrize("iterations", [1, 2, 10])
def test_random_tokens(n: int, k: int, width: int, iterations: int, seed: int) -> None:
    rng = np.random.default_rng([n, seed])
    assert_reference(
        draw_unit(rng, n, width, dtype=np.float32), rng.normal(size=(k, width)).astype(np.float32), iterations
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("iterations", [1, 10])
def test_separate_clusters_are_found(iterations: int, seed: int, empty_clusters: EmptyClusters) -> None:
    rng = np.random.default_rng(seed)
    centres, truth = draw_unit(rng, 12, 32, dtype=np.float32), rng.permutation(np.arange(200) % 12)
    tokens = reference.unit(centres[truth] + 0.02 * rng.normal(size=(200, 32))).astype(np.float32)
    seeds = (5 * (centres + 0.1 * rng.normal(size=centres.shape))).astype(np.float32)
    assert_reference(tokens, seeds, iterations)
    np.testing.assert_array_equal(kmeans(tokens, seeds, iterations)[0], truth)
    assert empty_clusters() == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n", "k", "width"), [(40, 3, 3), (300, 20, 16), (1024, 80, 64)])
@pytest.mark.parametrize("iterations", [1, 10])
def test_faiss(n: int, k: int, width: int, iterations: int, seed: int) -> None:
    """Where no cluster runs empty and no two seeds are alike, FAISS has nothing to leave to chance."""
    rng = np.random.default_rng([n, seed])
    centres = draw_unit(rng, k, width)
    tokens = reference.unit(centres[np.arange(n) % k] + 0.3 * rng.normal(size=(n, width))).astype(np.float32)
    seeds = (centres + 0.1 * rng.normal(size=centres.shape)).astype(np.float32)
    labels, centroids = kmeans(tokens, seeds, iterations)
    expected = by_faiss(tokens, seeds, iterations)
    np.testing.assert_array_equal(labels, expected[0])
    np.testing.assert_allclose(centroids, expected[1], atol=2e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [2, 10])
def test_all_tokens_are_clustered_however_many(k: int, seed: int) -> None:
    """By default FAISS would draw 256 of them for each cluster."""
    rng = np.random.default_rng(seed)
    assert_reference(draw_unit(rng, 256 * k + 300, 4, dtype=np.float32), rng.normal(size=(k, 4)).astype(np.float32), 4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("empty", [1, 3])
def test_empty_clusters_are_split_off(empty: int, seed: int, empty_clusters: EmptyClusters) -> None:
    rng = np.random.default_rng([empty, seed])
    tokens = reference.unit(rng.uniform(0.1, 1, (60, 8))).astype(np.float32)
    seeds = np.concatenate([-(draw_unit(rng, empty, 8, dtype=np.float32) ** 2), rng.uniform(0.1, 1, (5, 8))]).astype(
        np.float32
    )
    np.testing.assert_allclose(kmeans(tokens, seeds, 1)[1], by_faiss(tokens, seeds, 1)[1], atol=2e-6)
    for iterations in (1, 2, 9):
        assert_reference(tokens, seeds, iterations)
    assert empty_clusters() >= 3 * empty


def test_clusters_that_run_empty_later(empty_clusters: EmptyClusters) -> None:
    at_first = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        tokens = draw_unit(rng, 60, 3, dtype=np.float32)
        seeds = (tokens[:30] + 0.5 * rng.normal(size=(30, 3))).astype(np.float32)
        assert_reference(tokens, seeds, 6)
        before = empty_clusters()
        reference.kmeans(tokens, seeds, 1)
        at_first += empty_clusters() - before
    assert empty_clusters() > 2 * at_first


@pytest.mark.parametrize("identical", [False, True])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 80), (5, 6), (6, 6)])
def test_no_more_tokens_than_seeds(n: int, k: int, identical: bool) -> None:
    rng = np.random.default_rng(n)
    tokens, seeds = draw_unit(rng, n, 4, dtype=np.float32), draw_unit(rng, k, 4, dtype=np.float32)
    tokens = tokens[:1].repeat(n, axis=0) if identical else tokens
    labels, centroids = kmeans(tokens, seeds, 10)
    np.testing.assert_array_equal(labels, np.arange(n))
    np.testing.assert_array_equal(centroids, tokens)
    assert_reference(tokens, seeds, 10)


@pytest.mark.parametrize(("n", "k"), [(50, 1), (50, 9), (300, 80), (5, 9)])
def test_identical_tokens_are_one_group(n: int, k: int) -> None:
    tokens = draw_unit(np.random.default_rng(k), 1, 16, dtype=np.float32).repeat(n, axis=0)
    assert_reference(tokens, tokens[:1].repeat(k, axis=0), 3)
    labels, centroids = kmeans(tokens, tokens[:1].repeat(k, axis=0), 10)
    groups = fuse(centroids, np.bincount(labels, minlength=len(centroids)), 0.8)
    assert set(groups[labels]) == {0}


@pytest.mark.parametrize("zeros", [1, 49, 50])
def test_zero_tokens(zeros: int) -> None:
    rng = np.random.default_rng(zeros)
    tokens, seeds = draw_unit(rng, 50, 4, dtype=np.float32), draw_unit(rng, 3, 4, dtype=np.float32)
    tokens[:zeros] = 0
    assert_reference(tokens, seeds, 10)


@pytest.mark.parametrize("seed", range(4))
def test_ties_go_to_the_smallest_index(seed: int) -> None:
    """Few distinct tokens and seeds, their opposites among them, so that means cancel out and inner products tie."""
    rng = np.random.default_rng(seed)
    few = draw_unit(rng, 4, 40, dtype=np.float32)
    few = np.concatenate([few, -few, 0 * few[:1]])
    tokens, seeds = few[rng.integers(0, 9, 120)], few[rng.integers(0, 9, 12)] * np.float32(2)
    for iterations in (1, 10):
        assert_reference(tokens, seeds, iterations)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spread", [1e-3, 1e-5])
@pytest.mark.parametrize("block", [7, 64])
def test_tokens_that_are_nearly_equal(
    block: int, spread: float, seed: int, empty_clusters: EmptyClusters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float32 decides none of them, and most clusters run empty: objects without noise, each under several seeds."""
    monkeypatch.setattr(sys.modules[KMEANS], "BLOCK", block)
    rng = np.random.default_rng(seed)
    centres, owner = draw_unit(rng, 5, 24), rng.permutation(np.arange(300) % 5)
    tokens = reference.unit(centres[owner] + spread * rng.normal(size=(300, 24))).astype(np.float32)
    seeds = np.stack([tokens[rng.choice(300, 9)].mean(axis=0) if i % 2 else tokens[i] for i in range(20)])
    for iterations in (1, 3, 10):
        assert_reference(tokens, seeds, iterations)
    assert empty_clusters() > 0


def test_input_is_left_alone_and_may_be_strided() -> None:
    rng = np.random.default_rng(0)
    tokens, seeds = draw_unit(rng, 90, 6, dtype=np.float32), draw_unit(rng, 14, 6, dtype=np.float32)
    before = tokens.copy(), seeds.copy()
    strided = kmeans(tokens[::3], seeds[::2], 5)
    contiguous = kmeans(tokens[::3].copy(), seeds[::2].copy(), 5)
    np.testing.assert_array_equal(strided[0], contiguous[0])
    np.testing.assert_array_equal(strided[1], contiguous[1])
    np.testing.assert_array_equal(tokens, before[0])
    np.testing.assert_array_equal(seeds, before[1])
