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
    np.fill_diagonal(similarity, -np.inf)
    owner = np.arange(len(alive))  # the smallest cluster of each cluster's group
    while len(alive) and similarity.flat[first := similarity.argmax()] > threshold:
        row = int(first) // len(alive)
        members = np.append(np.flatnonzero(similarity[row] > threshold), row)
        owner[members] = members.min()
        similarity[members] = -np.inf
        similarity[:, members] = -np.inf
    groups = np.full(len(sizes), -1)
    groups[alive] = np.unique(owner, return_inverse=True)[1]
    return groups


def similarities(centroids: np.ndarray) -> np.ndarray:
    """What fusion decides by: cosines of centroids (k, C), rounded to 12 digits; (k, k) float64, symmetric.

    In float64: near-duplicates differ by less than float32's rounding, and the order of merging depends on them.
    """
    exact = centroids.astype(np.float64)
    unit = exact / np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1e-12)
    # By torch, whose threads stage one sets (NumPy's BLAS takes all cores); equals must tie, whatever its last digits.
    product = (torch.from_numpy(unit) @ torch.from_numpy(unit).T).clamp(-1, 1).numpy().round(12)
    upper = np.triu(product)  # the halves of a BLAS product may differ in the last digit, which rounding can widen
    return upper + np.triu(product, 1).T
