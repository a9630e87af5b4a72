"""Mask fusion, section 3.3: greedy merging of clusters whose centroids look alike, inspired by NMS."""

import numpy as np
import torch


def fuse(centroids: np.ndarray, sizes: np.ndarray, threshold: float) -> np.ndarray:
    """Groups of clusters.

    The largest cosine similarity left picks a row; if it is above `threshold`, the row's cluster is merged with all
    clusters still free whose similarity to it is above `threshold`, and none of them is used again. Ties go to the
    smallest index.

    Args:
        centroids: (k, C), any length.
        sizes: (k,) tokens in each cluster; empty clusters take no part.
        threshold: lambda.

    Returns:
        (k,) int64 group of each cluster, numbered from 0 by their smallest cluster; -1 for empty clusters.
    """
    alive = np.flatnonzero(sizes)
    similarity = similarities(centroids[alive])
    near = similarity > threshold
    rows, columns = np.nonzero(np.triu(near, 1))
    order = (-similarity[rows, columns]).argsort(kind="stable")
    free, owner = np.ones(len(alive), bool), np.arange(len(alive))  # owner: the smallest cluster of a cluster's group
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if free[row] and free[column]:
            members = np.flatnonzero(near[row] & free)
            owner[members] = members[0]
            free[members] = False
    groups = np.full(len(sizes), -1)
    groups[alive] = np.cumsum(owner == np.arange(len(alive)))[owner] - 1
    return groups


def similarities(centroids: np.ndarray) -> np.ndarray:
    """Cosines of centroids (k, C), rounded to 12 digits: (k, k) float64, symmetric.

    In float64, because near-duplicates differ by less than float32's rounding, and the order of merging depends on it.
    """
    # In torch, as stage one limits its threads (NumPy's BLAS takes all cores). Rounding makes equal cosines tie.
    exact = torch.from_numpy(centroids).double()
    products = (exact @ exact.T).numpy()
    lengths = np.sqrt(products.diagonal()).clip(min=1e-99)  # a zero centroid is similar to nothing
    cosines = (products / np.outer(lengths, lengths)).round(12)
    return np.maximum(cosines, cosines.T)  # rounding can make the two halves differ
