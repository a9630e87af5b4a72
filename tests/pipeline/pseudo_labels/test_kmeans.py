"""Both spherical K-means: against a plain one where no cluster runs empty, by their properties on any input."""

from typing import Any

import faiss
import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from pipeline.pseudo_labels.kmeans import KMEANS, Clusters, direction, unit_length
from tests import reference
from tests.pipeline.draws import draw_unit
from tests.reference import Array

Problem = tuple[Array, Array]  # tokens (n, C), seeds (k, C)
BOTH = pytest.mark.parametrize("kmeans", KMEANS)


def solve(kmeans: str, problems: list[Problem], iterations: int = 10) -> list[Clusters]:
    """Each problem as a view of one batch, with tokens and a seed beside its own that do not count."""
    kind = torch.float32 if kmeans == "faiss" else torch.float64
    tokens, inside, seeds = [], [], []
    for own, start in problems:
        mask = torch.arange(2 * len(own) + 1) % 2 == 1
        spread = torch.zeros(len(mask), own.shape[1], dtype=kind)
        spread[mask] = torch.from_numpy(own).to(kind)
        tokens.append(spread)
        inside.append(mask)
        seeds.append(torch.from_numpy(np.concatenate([start, np.zeros((1, own.shape[1]))])).to(kind))
    batch = (pad_sequence(rows, batch_first=True) for rows in (tokens, inside, seeds))
    return KMEANS[kmeans](*batch, torch.tensor([len(start) for _, start in problems]), iterations)


def draw_problems(rng: np.random.Generator, width: int = 8) -> list[Problem]:
    """Views that have little in common but their width."""
    tokens, seeds = draw_unit(rng, 150, width, dtype=np.float32), draw_unit(rng, 20, width, dtype=np.float32)
    few = np.concatenate([tokens[:4], -tokens[:4], 0 * tokens[:1]])
    positive = reference.unit(rng.uniform(0.1, 1, (60, width))).astype(np.float32)
    return [
        (tokens, 3 * seeds),
        (tokens[:1], seeds[:1]),  # one token
        (tokens[:7], seeds),  # fewer than seeds
        (tokens[:1].repeat(20, axis=0), seeds),  # as many, identical
        (tokens[:21], seeds),  # one more
        (tokens[:90], seeds[:1]),  # one seed
        (tokens[:0], seeds[:0]),  # nothing
        (0 * tokens[:50], 0 * seeds[:5]),  # zeros
        (few[rng.integers(0, 9, 120)], 2 * few[rng.integers(0, 9, 12)]),  # duplicates, opposites
        (tokens[:1].repeat(70, axis=0), tokens[:1].repeat(20, axis=0)),  # identical
        (reference.unit(tokens[0] + 1e-5 * tokens).astype(np.float32), tokens[:1] + 1e-6 * seeds),  # nearly
        (positive, np.concatenate([-(seeds[:3] ** 2), positive[:4]])),  # empty clusters
    ]


def draw_clusters(rng: np.random.Generator, n: int, k: int, width: int, spread: float) -> tuple[Array, Array, Array]:
    """Unit tokens about k centres, seeds near these, and to which of them each token belongs."""
    centres, truth = draw_unit(rng, k, width), rng.permutation(np.arange(n) % k)
    tokens = reference.unit(centres[truth] + spread * rng.normal(size=(n, width))).astype(np.float32)
    return tokens, (5 * (centres + 0.1 * rng.normal(size=centres.shape))).astype(np.float32), truth


@pytest.mark.parametrize("shape", [(3, 7), (4, 4, 5), (2, 512)])
def test_unit_length(shape: tuple[int, ...]) -> None:
    vectors = np.random.default_rng(0).normal(0, 30, shape).astype(np.float32)
    vectors[0] = 0
    found = unit_length(torch.from_numpy(vectors))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, reference.unit(vectors), atol=1e-7)


@pytest.mark.parametrize("length", [0, 1e-12, 1e-8, 3])
def test_what_cancels_out_has_no_direction(length: float) -> None:
    vectors = length * np.array([[0.6, 0.8], [-1, 0]])
    expected = np.sign(max(length - 1e-9, 0)) * np.array([[0.6, 0.8], [-1, 0]])
    np.testing.assert_allclose(direction(torch.from_numpy(vectors)), expected, atol=1e-15)


@BOTH
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("n", "k", "width"), [(2, 1, 3), (40, 3, 3), (5000, 9, 4), (300, 20, 16), (1024, 80, 64)])
@pytest.mark.parametrize("iterations", [1, 2, 10])
def test_reference(kmeans: str, iterations: int, n: int, k: int, width: int, seed: int) -> None:
    """All tokens count, though FAISS would by default draw 256 for each cluster."""
    tokens, seeds, _ = draw_clusters(np.random.default_rng([n, seed]), n, k, width, 0.3)
    ((labels, centroids),) = solve(kmeans, [(tokens, seeds)], iterations)
    expected = reference.kmeans(tokens, seeds, iterations)
    np.testing.assert_array_equal(labels, expected[0])
    np.testing.assert_allclose(centroids, expected[1], atol=2e-6 if kmeans == "faiss" else 1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("iterations", [1, 2, 10])
def test_torch_on_any_input(iterations: int, seed: int) -> None:
    problems = draw_problems(np.random.default_rng(seed))
    for (tokens, seeds), (labels, centroids) in zip(problems, solve("torch", problems, iterations), strict=True):
        if len(tokens):
            expected = reference.kmeans(tokens, seeds, iterations)
            np.testing.assert_array_equal(labels, expected[0])
            np.testing.assert_allclose(centroids, expected[1], atol=1e-7)


@BOTH
@pytest.mark.parametrize("seed", range(3))
def test_each_token_is_with_the_nearest_centroid(kmeans: str, seed: int) -> None:
    """And the same again gives the same bytes."""
    problems = draw_problems(np.random.default_rng(seed))
    found, again = solve(kmeans, problems), solve(kmeans, problems)
    for (tokens, seeds), (labels, centroids), twice in zip(problems, found, again, strict=True):
        np.testing.assert_array_equal(labels, twice[0])
        np.testing.assert_array_equal(centroids, twice[1])
        assert len(centroids) == min(len(tokens), len(seeds)) and len(labels) == len(tokens)
        lengths = np.linalg.norm(centroids, axis=1)
        np.testing.assert_allclose(lengths[lengths > 0], 1, atol=1e-6)
        products = tokens.astype(float) @ centroids.T.astype(float)
        if len(tokens) > len(seeds):
            assert (products[np.arange(len(labels)), labels] > products.max(axis=1) - 1e-6).all()
        else:
            np.testing.assert_array_equal(labels, np.arange(len(tokens)))
            np.testing.assert_array_equal(centroids, tokens)


def test_faiss_computes_on_one_thread_whatever_the_caller_has(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, seeds, _ = draw_clusters(np.random.default_rng(0), 40, 3, 4, 0.3)
    before, train, found = faiss.omp_get_max_threads(), faiss.Clustering.train, []

    def watched(*given: Any, **named: Any) -> None:
        found.append(faiss.omp_get_max_threads())
        train(*given, **named)

    monkeypatch.setattr(faiss.Clustering, "train", watched)
    faiss.omp_set_num_threads(2)
    try:
        solve("faiss", [(tokens, seeds)])
        assert (found, faiss.omp_get_max_threads()) == ([1], 2)
    finally:
        faiss.omp_set_num_threads(before)


@BOTH
@pytest.mark.parametrize("seed", range(2))
def test_a_view_does_not_depend_on_the_batch(kmeans: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    problems = draw_problems(rng)
    alone = [solve(kmeans, [problem])[0][0] for problem in problems]
    for _ in range(3):
        order = rng.permutation(len(problems))[: rng.integers(2, len(problems) + 1)]
        for index, (labels, _) in zip(order, solve(kmeans, [problems[i] for i in order]), strict=True):
            np.testing.assert_array_equal(labels, alone[index])


@BOTH
def test_input_is_left_alone(kmeans: str) -> None:
    problems = draw_problems(np.random.default_rng(0))
    before = [(tokens.copy(), seeds.copy()) for tokens, seeds in problems]
    solve(kmeans, problems)
    for problem, copies in zip(problems, before, strict=True):
        for given, copy in zip(problem, copies, strict=True):
            np.testing.assert_array_equal(given, copy)
