"""Spherical K-means from given seeds, by FAISS."""

import faiss
import numpy as np


def unit_length(tokens: np.ndarray) -> np.ndarray:
    """(..., C) float32 at length 1; a zero token stays zero."""
    length = np.linalg.norm(tokens, axis=-1, keepdims=True)
    return np.asarray(tokens / np.where(length == 0, 1, length), dtype=np.float32)


def kmeans(tokens: np.ndarray, seeds: np.ndarray, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """Clusters unit-length tokens by cosine similarity, starting from the seeds.

    With no more tokens than seeds there is nothing to cluster: every token is a cluster of its own. Clusters that run
    empty are split off large ones by FAISS.

    Args:
        tokens: (n, C) float32, unit length.
        seeds: (k, C) float32.

    Returns:
        labels (n,) int64 and centroids (k or n, C) float32, unit length.
    """
    if len(tokens) <= len(seeds):
        return np.arange(len(tokens)), tokens
    clustering = faiss.Kmeans(
        tokens.shape[1],
        len(seeds),
        niter=iterations,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=len(tokens),
    )
    clustering.train(np.ascontiguousarray(tokens), init_centroids=np.ascontiguousarray(seeds))
    _, labels = clustering.index.search(np.ascontiguousarray(tokens), 1)
    return labels[:, 0], np.asarray(clustering.centroids)
