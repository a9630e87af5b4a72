"""Spherical K-means of one view, from given seeds, on a CPU: FAISS computes the distances.

What this path and the one in batched.py compute is FAISS's spherical K-means (faiss.Clustering, spherical=True): seeds
are brought to unit length; a token belongs to the centroid with which its inner product is largest; a centroid is the
mean of its tokens, brought to unit length; clusters that run empty are split off others by FAISS's rule (split.py);
after the last update tokens are assigned once more. Where faiss.Clustering leaves labels to float32's last digits, and
so to the BLAS, the processor and the number of threads, both paths are exact, and so equal:

- Sums and centroids are float64, and so is an assignment that float32 cannot decide. Inner products that differ by no
  more than TIE are equal, and the smallest index wins.
- A mean shorter than VANISHED has no direction: the centroid is zero.
- All iterations run. (FAISS stops when the objective, a float32 sum, does not change, unless early_stop_threshold is
  negative.) Once no token moves nothing changes any more, which is where the loop ends.

It is faster than faiss.Clustering by leaving out what cannot change: centroids whose tokens stay the same keep their
distances. Tokens that float32 leaves undecided are compared exactly in blocks of tokens that are alike, with those
centroids alone that float32 leaves to one of the block.
"""

import numpy as np
import torch
from torch import Tensor

from pipeline.openmp import faiss, one_thread
from pipeline.pseudo_labels.split import split_empty

MARGIN = 1e-5  # no two float32 inner products or squared distances of unit vectors are wrong by this much together
TIE = 1e-12
BLOCK = 64  # undecided tokens compared exactly at a time
VANISHED = 1e-9


def unit_length(tokens: Tensor) -> Tensor:
    """(..., C) at length 1, of the same type; a zero token stays zero."""
    length = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True, dtype=torch.float64)
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
    exact = tokens.astype(np.float64)  # once: sums and undecided tokens need it at every step
    centroids, sums = direction(seeds.astype(np.float64)), np.zeros(seeds.shape)
    distances, parity, none = np.empty((k, n), np.float32), np.arange(tokens.shape[1]) % 2, np.zeros(k, bool)
    labels, before = _assign(tokens, exact, centroids, ~none, distances), np.full(n, -1)
    altered = ~none  # the first update moves every centroid: none is a mean yet
    for _ in range(iterations):
        changed = _move(exact, before, labels, sums) | altered
        sizes, altered = np.bincount(labels, minlength=k), none
        centroids[changed] = direction(sums[changed])
        if (sizes == 0).any():
            source, factors = split_empty(sizes)
            altered = factors[:, 0] != 1  # also at the next update, which undoes it
            centroids[altered] = direction(centroids[source[altered]] * factors[altered][:, parity])
            changed |= altered
        before, labels = labels, _assign(tokens, exact, centroids, changed, distances)
        if np.array_equal(labels, before):
            break
    return labels, centroids


def direction(vectors: np.ndarray) -> np.ndarray:
    """(k, C) float64 at length 1; zero where there is no direction."""
    length = np.sqrt(np.vecdot(vectors, vectors))[:, None]
    return vectors * np.where(length < VANISHED, 0, 1 / np.maximum(length, VANISHED))


def _move(tokens: np.ndarray, before: np.ndarray, labels: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Brings the clusters' sums (k, C) up to date (torch adds rows fast); which gained or lost tokens (k,) bool."""
    moved, changed, into = np.flatnonzero(before != labels), np.zeros(len(sums), bool), torch.from_numpy(sums)
    if 3 * len(moved) > len(labels):  # where many move, adding all anew costs less
        into.zero_().index_add_(0, torch.from_numpy(labels), torch.from_numpy(tokens))
    else:
        rows = torch.from_numpy(tokens[moved])
        into.index_add_(0, torch.from_numpy(labels[moved]), rows)
        into.index_add_(0, torch.from_numpy(before[moved]), rows, alpha=-1)
    changed[labels[moved]] = changed[before[moved]] = True
    return changed


def _assign(
    tokens: np.ndarray, exact: np.ndarray, centroids: np.ndarray, changed: np.ndarray, distances: np.ndarray
) -> np.ndarray:
    """Labels (n,): the largest inner product of each token, the first within TIE.

    Brings `distances` up to date: (k, n), FAISS's squared distances |c|^2 + |t|^2 - 2 c.t, as if all |c| were 1.
    """
    if changed.any():
        moved = centroids[changed].astype(np.float32)
        with one_thread():
            squares = faiss.pairwise_distances(moved, tokens)
        distances[changed] = squares + ~moved.any(axis=1, keepdims=True)
    close = distances <= distances.min(axis=0) + np.float32(MARGIN)  # (k, n)
    label, token = np.divmod(np.flatnonzero(close), len(tokens))
    labels = np.empty(len(tokens), np.int64)
    labels[token] = label
    if len(token) > len(tokens):
        unsure = np.flatnonzero(np.bincount(token) > 1)
        unsure = unsure[labels[unsure].argsort(kind="stable")]  # alike tokens side by side: few candidates in a block
        for start in range(0, len(unsure), BLOCK):
            rows = unsure[start : start + BLOCK]
            few = np.flatnonzero(close[:, rows].any(axis=1))
            products = torch.mm(torch.from_numpy(centroids[few]), torch.from_numpy(exact[rows]).T).numpy()
            labels[rows] = few[(products >= products.max(axis=0) - TIE).argmax(axis=0)]
    return labels
