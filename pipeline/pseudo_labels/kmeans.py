"""Spherical K-means of one view, from given seeds, on a CPU: FAISS assigns the tokens.

What this path and the one in batched.py compute is FAISS's spherical K-means (faiss.Clustering, spherical=True): seeds
are brought to unit length; a token belongs to the centroid with which its inner product is largest; a centroid is the
mean of its tokens, brought to unit length; clusters that run empty are split off others by FAISS's rule (split.py);
after the last update tokens are assigned once more. Where faiss.Clustering leaves things to float32's last digits, and
so to the BLAS, the processor and the number of threads, both paths are exact:

- Sums and centroids are float64, and so is an assignment that float32 cannot decide. Inner products that differ by no
  more than TIE are equal, and the smallest index wins.
- A mean shorter than VANISHED has no direction: the centroid is zero.
- All iterations run. (FAISS stops when the objective, a float32 sum, does not change, unless early_stop_threshold is
  negative.) Once no token moves nothing changes any more, which is where the loop ends.

It is faster than faiss.Clustering by leaving out what cannot change: tokens whose own centroid stayed where it was are
compared with the centroids that moved, and with no others.
"""

import faiss
import numpy as np
import torch
from torch import Tensor

from pipeline.pseudo_labels.split import split_empty

MARGIN = 1e-5  # no two float32 inner products of unit vectors are wrong by this much together
LEADERS = 2  # centroids that a search returns
TIE = 1e-12
VANISHED = 1e-9


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
    wide = torch.from_numpy(tokens).double()
    centroids, sums = direction(seeds.astype(np.float64)), np.zeros(seeds.shape)
    shift = centroids.mean(axis=0)  # off all centroids it changes no choice; the less is left, the finer is float32
    parity, altered = np.arange(tokens.shape[1]) % 2, np.zeros(k, bool)
    labels, similarity = _nearest(tokens, wide, centroids, shift)
    before = None
    for _ in range(iterations):
        changed = _move(wide, before, labels, sums) | altered
        sizes, altered = np.bincount(labels, minlength=k), np.zeros(k, bool)
        centroids[changed] = direction(sums[changed])
        if (sizes == 0).any():
            source, factors = split_empty(sizes)
            altered = factors[:, 0] != 1  # also at the next update, which undoes it
            centroids[altered] = direction(centroids[source[altered]] * factors[altered][:, parity])
            changed |= altered
        again = np.flatnonzero(_shaken(tokens, labels, similarity, centroids - shift, changed))
        before, labels = labels, labels.copy()
        if len(again) == n:
            labels, similarity = _nearest(tokens, wide, centroids, shift)
        elif len(again):
            labels[again], similarity[again] = _nearest(tokens[again], wide[again], centroids, shift)
        if np.array_equal(labels, before):
            break
    return labels, centroids


def direction(vectors: np.ndarray) -> np.ndarray:
    """(k, C) float64 at length 1; zero where there is no direction."""
    length = np.sqrt(np.vecdot(vectors, vectors))[:, None]
    return vectors * np.where(length < VANISHED, 0, 1 / np.maximum(length, VANISHED))


def _move(wide: Tensor, before: np.ndarray | None, labels: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Brings the clusters' sums (k, C) up to date; which clusters gained or lost tokens (k,) bool."""
    into = torch.from_numpy(sums)
    if before is None:
        into.index_add_(0, torch.from_numpy(labels), wide)
        return np.ones(len(sums), bool)
    moved, changed = np.flatnonzero(before != labels), np.zeros(len(sums), bool)
    rows = wide[torch.from_numpy(moved)]
    into.index_add_(0, torch.from_numpy(labels[moved]), rows)
    into.index_add_(0, torch.from_numpy(before[moved]), rows, alpha=-1)
    changed[labels[moved]] = changed[before[moved]] = True
    return changed


def _shaken(
    tokens: np.ndarray, labels: np.ndarray, similarity: np.ndarray, centroids: np.ndarray, changed: np.ndarray
) -> np.ndarray:
    """Tokens (n,) bool whose centroid changed, or that a changed one is about as similar to as their own."""
    again = changed[labels]
    steady = np.flatnonzero(~again)
    if len(steady) and changed.any():
        found, _ = _search(tokens[steady], centroids[changed], 1)
        again[steady] = found[:, 0] >= similarity[steady] - _margin(centroids)
    return again


def _search(tokens: np.ndarray, centroids: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    index = faiss.IndexFlatIP(tokens.shape[1])
    index.add(centroids.astype(np.float32))
    return index.search(tokens, count)


def _margin(centroids: np.ndarray) -> np.float32:
    return np.float32(MARGIN * np.sqrt(np.vecdot(centroids, centroids).max()) + TIE)


def _nearest(
    tokens: np.ndarray, wide: Tensor, centroids: np.ndarray, shift: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,), the largest inner product of each token, the first within TIE; and it, less the shift's, float32."""
    moved = centroids - shift
    found, index = _search(tokens, moved, min(LEADERS, len(centroids)))
    labels, close = index[:, 0].copy(), found >= found[:, :1] - _margin(moved)
    unsure = np.flatnonzero(close[:, 1:2])
    if len(unsure):
        every = np.arange(len(centroids))
        columns = every if close[:, -1].any() else np.unique(index[unsure][close[unsure]])
        exact = torch.mm(wide[torch.from_numpy(unsure)], torch.from_numpy(centroids[columns]).T).numpy()
        labels[unsure] = columns[(exact >= exact.max(axis=1, keepdims=True) - TIE).argmax(axis=1)]
    return labels, found[:, 0]
