"""Spherical K-means from given seeds, section 3.3, by two implementations: FAISS for CPUs, torch for GPUs.

A token belongs to the centroid with the largest inner product; a centroid is the mean of its tokens, scaled to unit
length. The two differ if a cluster becomes empty: FAISS splits another cluster, torch keeps the old centroid. On one
machine, each always gives a view the same labels, whatever else is in the batch.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pipeline.openmp import faiss, one_thread

TIE = 1e-12  # float64 inner products this close count as equal: on a GPU, the order of additions is not fixed
VANISHED = 1e-9

Clusters = tuple[np.ndarray, np.ndarray]  # of a view: labels (n,) int64, centroids (k, C)


def unit_length(tokens: Tensor) -> Tensor:
    """(..., C) at length 1; a zero token stays zero."""
    return tokens / lengths(tokens)


def lengths(tokens: Tensor) -> Tensor:
    """(..., 1), clamped so that one can divide by it."""
    return torch.linalg.vector_norm(tokens, dim=-1, keepdim=True).clamp_(min=1e-37)


def direction(sums: Tensor) -> Tensor:
    """(..., C) float64 at unit length; zero if the vectors cancel out up to rounding."""
    length = torch.linalg.vector_norm(sums, dim=-1, keepdim=True)
    return torch.where(length < VANISHED, 0, sums / length.clamp(min=VANISHED))


def kmeans_faiss(tokens: Tensor, inside: Tensor, seeds: Tensor, seed_counts: Tensor, iterations: int) -> list[Clusters]:
    """Cluster each view's tokens, one view after the other, on the CPU.

    If a view has no more tokens than seeds, every token is its own cluster.

    Args:
        tokens: (B, n, C) float32, unit length or zero.
        inside: (B, n) bool, tokens to cluster.
        seeds: (B, k, C) float32, any length.
        seed_counts: (B,) int64, the number of each view's seeds; the rest of `seeds` is ignored.
    """
    found: list[Clusters] = []
    with one_thread():  # FAISS's labels depend on how sums are split among threads
        for view, count in enumerate(seed_counts.tolist()):
            own = (tokens[view] if inside[view].all() else tokens[view][inside[view]]).numpy()
            if len(own) <= count:
                found.append((np.arange(len(own)), own))
                continue
            clustering, index = faiss.Clustering(own.shape[1], count), faiss.IndexFlatIP(own.shape[1])
            clustering.niter, clustering.spherical, clustering.check_input_data_for_NaNs = iterations, True, False
            clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, len(own)  # use all, no warning
            faiss.copy_array_to_vector(seeds[view, :count].numpy().ravel(), clustering.centroids)
            clustering.train(own, index)
            centroids = faiss.vector_to_array(clustering.centroids).reshape(count, -1)
            found.append((index.search(own, 1)[1][:, 0], centroids))
    return found


def kmeans_torch(tokens: Tensor, inside: Tensor, seeds: Tensor, seed_counts: Tensor, iterations: int) -> list[Clusters]:
    """The same for all views at once, on any device, in float64; tokens that are not inside must be zero."""
    absent = torch.arange(seeds.shape[1], device=seeds.device) >= seed_counts[:, None]
    centroids = direction(seeds)
    labels = _nearest(tokens, centroids, absent)
    for _ in range(iterations):
        sums = torch.zeros_like(seeds).scatter_add_(1, labels[..., None].expand_as(tokens), tokens)
        sizes = torch.zeros_like(seeds[..., 0]).scatter_add_(1, labels, inside.double())
        centroids = torch.where(sizes[..., None] > 0, direction(sums), centroids)
        before, labels = labels, _nearest(tokens, centroids, absent)
        if torch.equal(before, labels):
            break
    found: list[Clusters] = []
    masks, all_labels, all_centroids = (part.cpu().numpy() for part in (inside, labels, centroids))
    for view, count in enumerate(seed_counts.tolist()):
        own = all_labels[view][masks[view]]
        if len(own) <= count:
            found.append((np.arange(len(own)), tokens[view][inside[view]].cpu().numpy()))
        else:
            found.append((own, all_centroids[view, :count]))
    return found


def _nearest(tokens: Tensor, centroids: Tensor, absent: Tensor) -> Tensor:
    """(B, n) index of the centroid with the largest inner product (ties: the first), except `absent` ones (B, k)."""
    products = torch.bmm(tokens, centroids.transpose(1, 2)).masked_fill_(absent[:, None], -torch.inf)
    return (products >= products.amax(dim=2, keepdim=True) - TIE).to(torch.uint8).argmax(dim=2)


KMeans = Callable[[Tensor, Tensor, Tensor, Tensor, int], list[Clusters]]
KMEANS: dict[str, KMeans] = {"faiss": kmeans_faiss, "torch": kmeans_torch}
