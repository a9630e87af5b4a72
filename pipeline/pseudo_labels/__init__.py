"""Pseudo labels of views: multi-scale seeds (Eq. 4) -> K-means -> mask fusion, on unannotated tokens only."""

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import PseudoLabels
from pipeline.pseudo_labels.batched import kmeans_batched
from pipeline.pseudo_labels.fusion import fuse
from pipeline.pseudo_labels.kmeans import kmeans, unit_length
from pipeline.pseudo_labels.seeds import window_seeds

ANNOTATED = 255


def pseudo_labels(
    dense_tokens: np.ndarray, unannotated: np.ndarray, config: PseudoLabels
) -> tuple[np.ndarray, np.ndarray]:
    """Clusters and fused groups of the unannotated tokens of one view.

    Args:
        dense_tokens: (G, G, C) float32, any length.
        unannotated: (G, G) bool.

    Returns:
        K-means labels and fused groups, each (G, G) uint8 from 0, ANNOTATED (255) elsewhere.

    Raises:
        UserError: the windows give more seeds than labels fit, or a token is not finite.
    """
    free = torch.from_numpy(unannotated)[None]
    tokens, seeds, seed_counts = prepare(torch.from_numpy(dense_tokens)[None], free, config)
    labels, centroids = kmeans(tokens[0].numpy(), seeds[0, : int(seed_counts[0])].numpy(), config.iterations)
    return fuse_and_place(labels, centroids, unannotated, config)


def pseudo_labels_of(
    dense_tokens: Tensor, unannotated: np.ndarray, config: PseudoLabels
) -> tuple[np.ndarray, np.ndarray]:
    """The pseudo labels of many views: one after the other on a CPU, all at once where the tokens are on a GPU.

    Both give the same labels, and those of a view do not depend on the views beside it (kmeans.py says why).

    Args:
        dense_tokens: (B, G, G, C) float32, any length, on any device.
        unannotated: (B, G, G) bool.

    Returns:
        K-means labels and fused groups, each (B, G, G) uint8 from 0, ANNOTATED (255) elsewhere.

    Raises:
        UserError: as pseudo_labels.
    """
    if dense_tokens.device.type == "cpu":
        views = [pseudo_labels(*view, config) for view in zip(dense_tokens.numpy(), unannotated, strict=True)]
    else:
        views = label_batched(dense_tokens, unannotated, config)
    maps = np.array(views, np.uint8).reshape(-1, 2, *unannotated.shape[1:])
    return maps[:, 0], maps[:, 1]


def label_batched(
    dense_tokens: Tensor, unannotated: np.ndarray, config: PseudoLabels
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The way of pseudo_labels_of on a GPU, one pair of maps per view; runs on a CPU too."""
    free = torch.from_numpy(unannotated).to(dense_tokens.device)
    tokens, seeds, seed_counts = prepare(dense_tokens, free, config)
    token_counts = free.flatten(1).sum(dim=1)
    found = kmeans_batched(tokens, token_counts, seeds, seed_counts, config.iterations)
    labels, centroids = (part.cpu().numpy() for part in found)
    counts = np.minimum(seed_counts.cpu().numpy(), token_counts.cpu().numpy())
    return [
        fuse_and_place(labels[view][labels[view] >= 0], centroids[view, : counts[view]], mask, config)
        for view, mask in enumerate(unannotated)
    ]


def prepare(dense_tokens: Tensor, unannotated: Tensor, config: PseudoLabels) -> tuple[Tensor, Tensor, Tensor]:
    """Unannotated tokens (B, n, C) at length 1, then zeros; seeds (B, k, C), then zeros; counts of the seeds (B,)."""
    flat = unannotated.flatten().nonzero()[:, 0]
    free = unit_length(dense_tokens.flatten(0, 2).index_select(0, flat))
    if not free.sum().isfinite():
        raise UserError("the teacher gave dense tokens that are not finite: check its weights (teacher)")
    grid = torch.zeros_like(dense_tokens).flatten(0, 2).index_add_(0, flat, free).view_as(dense_tokens)
    seeds, seed_counts = window_seeds(grid, unannotated, config.windows)
    most = int(seed_counts.max())
    if most > ANNOTATED:
        raise UserError(
            f"pseudo_labels.windows {list(config.windows)} give {most} seeds on a grid of {grid.shape[1]}, "
            f"and at most {ANNOTATED} fit: choose larger windows"
        )
    return _pad(free, unannotated.flatten(1).sum(dim=1)), seeds[:, :most], seed_counts


def _pad(tokens: Tensor, counts: Tensor) -> Tensor:
    """(N, C), the views' tokens one after the other, (B,) -> (B, n, C)."""
    if len(counts) == 1:
        return tokens[None]
    padded = tokens.new_zeros(len(counts), int(counts.max()), tokens.shape[1])
    padded[torch.arange(padded.shape[1], device=tokens.device) < counts[:, None]] = tokens
    return padded


def fuse_and_place(
    labels: np.ndarray, centroids: np.ndarray, unannotated: np.ndarray, config: PseudoLabels
) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,) of a view's unannotated tokens, centroids (k, C) -> maps of clusters and of fused groups (G, G)."""
    clusters = np.full(unannotated.shape, ANNOTATED, np.uint8)
    groups = clusters.copy()
    if len(labels):
        group_of = fuse(centroids, np.bincount(labels, minlength=len(centroids)), config.threshold)
        clusters[unannotated], groups[unannotated] = labels, group_of[labels]
    return clusters, groups
