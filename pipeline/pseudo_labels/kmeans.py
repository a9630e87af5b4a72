"""Spherical K-means of one view, from given seeds, on a CPU.

What both this path and the one in batched.py compute is FAISS's spherical K-means (faiss.Clustering, spherical=True):
seeds are brought to unit length; a token belongs to the centroid with which its inner product is largest; a centroid is
the mean of its tokens, brought to unit length; clusters that run empty are split off others by FAISS's rule
(split.py); after the last update tokens are assigned once more. Where float32 leaves things to chance, it is exact:

- Sums and centroids are float64, and so is an assignment that float32 cannot decide. Inner products that differ by no
  more than TIE are equal, and the smallest index wins. Neither the BLAS, the device nor the views beside it matter.
- A mean shorter than VANISHED has no direction: the centroid is zero.
- All iterations run. (FAISS stops when the objective, a float32 sum, does not change, unless early_stop_threshold is
  negative.) Once no token moves nothing changes any more, which is where the loop ends.

It is fast by doing less than a plain loop, not other things: centroids that step by d change inner products with unit
tokens by at most d, so that pairs which cannot come first are not computed (the bounds of Elkan, ICML 2003).
"""

import faiss
import numpy as np
import torch
from torch import Tensor

from pipeline.pseudo_labels.split import split_empty

MARGIN = 1e-5  # no two float32 inner products of unit vectors are wrong by this much together
TIE = 1e-12
VANISHED = 1e-9
PAIR_COST = 3  # of an inner product computed on its own, in those of a matrix product


def unit_length(tokens: Tensor) -> Tensor:
    """(..., C) at length 1, of the same type; a zero token stays zero."""
    length = torch.linalg.vector_norm(tokens.double(), dim=-1, keepdim=True)
    return tokens / torch.where(length == 0, 1, length).to(tokens.dtype)


def kmeans(tokens: np.ndarray, seeds: np.ndarray, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """Clusters unit-length tokens by cosine similarity, starting from the seeds.

    With no more tokens than seeds there is nothing to cluster: every token is a cluster of its own.

    Args:
        tokens: (n, C) float32, unit length or zero.
        seeds: (k, C), any length.

    Returns:
        labels (n,) int64 and centroids (k or n, C) float64, unit length or zero.
    """
    n, k = len(tokens), len(seeds)
    if n <= k:
        return np.arange(n), tokens.astype(np.float64)
    tokens = np.ascontiguousarray(tokens, np.float32)
    centroids = direction(seeds.astype(np.float64))
    upper = tokens @ centroids.astype(np.float32).T  # (n, k), never below the inner products
    labels = _nearest(tokens, centroids, upper, np.arange(n))
    before, sums, was_split = None, np.zeros(centroids.shape), True
    for _ in range(iterations):
        touched = _move(tokens, before, labels, sums)
        sizes = np.bincount(labels, minlength=k)
        split = bool((sizes == 0).any())
        changed = np.arange(k) if split or was_split else touched
        means = direction(sums[changed])
        if split:
            source, factors = split_empty(sizes)
            means = direction(means[source] * factors[:, np.arange(means.shape[1]) % 2])
        steps = np.zeros(k)
        difference = means - centroids[changed]
        steps[changed] = np.sqrt(np.vecdot(difference, difference))
        centroids[changed], was_split = means, split
        before, labels = labels, _reassign(tokens, centroids, steps, labels, upper)
        if np.array_equal(labels, before):
            break
    return labels, centroids


def direction(vectors: np.ndarray) -> np.ndarray:
    """(k, C) float64 at length 1; zero where there is no direction."""
    length = np.sqrt(np.vecdot(vectors, vectors))[:, None]
    return vectors * np.where(length < VANISHED, 0, 1 / np.maximum(length, VANISHED))


def _move(tokens: np.ndarray, before: np.ndarray | None, labels: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Brings the clusters' sums (k, C) up to date (torch adds rows fast); the clusters that gained or lost tokens."""
    into = torch.from_numpy(sums)
    if before is None:
        into.index_add_(0, torch.from_numpy(labels), torch.from_numpy(tokens).double())
        return np.unique(labels)
    moved = np.flatnonzero(before != labels)
    rows = torch.from_numpy(tokens[moved]).double()
    into.index_add_(0, torch.from_numpy(labels[moved]), rows)
    into.index_add_(0, torch.from_numpy(before[moved]), rows, alpha=-1)
    return np.unique(np.concatenate([labels[moved], before[moved]]))


def _reassign(
    tokens: np.ndarray, centroids: np.ndarray, steps: np.ndarray, labels: np.ndarray, upper: np.ndarray
) -> np.ndarray:
    """Labels (n,) after the centroids (k, C) made steps (k,), from those before and the bounds (n, k), now raised.

    Bounds are tightened to inner products wherever they reach what a token has with its present centroid.
    """
    rows, narrow = np.arange(len(labels)), centroids.astype(np.float32)
    upper += np.where(steps > 0, steps + MARGIN / 10, 0).astype(np.float32)
    own = upper[rows, labels]
    left = np.flatnonzero(steps[labels] > 0)  # tokens whose present centroid made a step
    own[left] = _inner_products(tokens, left, narrow, labels[left])
    upper[rows, labels] = -np.inf
    rivals = np.flatnonzero(upper > own[:, None] - np.float32(MARGIN))
    upper[rows, labels] = own
    if PAIR_COST * len(rivals) > upper.size:
        np.matmul(tokens, narrow.T, out=upper)
        return _nearest(tokens, centroids, upper, rows)
    row, column = np.divmod(rivals, len(centroids))
    upper.reshape(-1)[rivals] = _inner_products(tokens, row, narrow, column)
    contested = row[np.flatnonzero(np.diff(row, prepend=-1))]
    labels = labels.copy()
    labels[contested] = _nearest(tokens, centroids, upper, contested)
    return labels


def _inner_products(tokens: np.ndarray, row: np.ndarray, centroids: np.ndarray, column: np.ndarray) -> np.ndarray:
    """(p,) float32, of tokens and centroids of these indices."""
    found = np.empty(len(row), np.float32)
    arrays = (faiss.swig_ptr(array) for array in (tokens, row, centroids, column, found))
    faiss.pairwise_indexed_inner_product(tokens.shape[1], len(row), *arrays)
    return found


def _nearest(tokens: np.ndarray, centroids: np.ndarray, upper: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Labels of these tokens; the largest of their bounds, and what is within MARGIN of it, are inner products."""
    bounds = upper[rows] if len(rows) < len(upper) else upper
    labels = bounds.argmax(axis=1)
    close = bounds >= bounds[np.arange(len(rows)), labels][:, None] - np.float32(MARGIN)
    if np.count_nonzero(close) > len(rows):
        tied = np.flatnonzero(close.sum(axis=1) > 1)
        exact = np.where(close[tied], tokens[rows[tied]].astype(np.float64) @ centroids.T, -np.inf)
        labels[tied] = (exact >= exact.max(axis=1, keepdims=True) - TIE).argmax(axis=1)
    return labels
