"""Pseudo labels of views: multi-scale seeds (Eq. 4) -> K-means -> mask fusion, on unannotated tokens only."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from configs.errors import UserError
from configs.schema import PseudoLabels
from pipeline.precision import with_float64
from pipeline.pseudo_labels.batched import kmeans_batched
from pipeline.pseudo_labels.fusion import fuse
from pipeline.pseudo_labels.kmeans import TIE, kmeans, unit_length
from pipeline.pseudo_labels.seeds import window_seeds

ANNOTATED = 255


def pseudo_labels(dense_tokens: Tensor, unannotated: np.ndarray, config: PseudoLabels) -> tuple[np.ndarray, np.ndarray]:
    """Clusters and fused groups of the unannotated tokens of a batch of views.

    On a CPU one view after the other, by FAISS; on a GPU all at once, by torch. Both give the same labels, and those of
    a view do not depend on the views beside it (kmeans.py says why).

    Args:
        dense_tokens: (B, G, G, C) float32, any length, on any device.
        unannotated: (B, G, G) bool.

    Returns:
        K-means labels and fused groups, each (B, G, G) uint8 from 0, ANNOTATED (255) elsewhere.

    Raises:
        UserError: the windows give more seeds than labels fit, or a token that counts is not finite.
    """
    dense_tokens = with_float64(dense_tokens)
    label = label_one_by_one if dense_tokens.device.type == "cpu" else label_batched
    return label(dense_tokens, unannotated, config)


def label_one_by_one(
    dense_tokens: Tensor, unannotated: np.ndarray, config: PseudoLabels
) -> tuple[np.ndarray, np.ndarray]:
    """pseudo_labels on a CPU."""
    clusters = np.full(unannotated.shape, ANNOTATED, np.uint8)
    groups = clusters.copy()
    for view, mask in enumerate(unannotated):
        tokens, scales = _prepare(dense_tokens[view : view + 1], torch.from_numpy(mask)[None], config)
        own = tokens[0]
        found = [kmeans(own.numpy(), seeds[0, : int(counts[0])].numpy(), config.iterations) for seeds, counts in scales]
        clusters[view][mask], groups[view][mask] = _fused(own, found, config)
    return clusters, groups


def label_batched(dense_tokens: Tensor, unannotated: np.ndarray, config: PseudoLabels) -> tuple[np.ndarray, np.ndarray]:
    """pseudo_labels on a GPU; runs on a CPU too."""
    clusters = np.full(unannotated.shape, ANNOTATED, np.uint8)
    groups = clusters.copy()
    if not unannotated.any():
        return clusters, groups
    free = torch.from_numpy(unannotated).to(dense_tokens.device)
    tokens, scales = _prepare(dense_tokens, free, config)
    token_counts = free.flatten(1).sum(dim=1)
    found = []
    for seeds, seed_counts in scales:
        labels, centroids = kmeans_batched(tokens, token_counts, seeds, seed_counts, config.iterations)
        counts = torch.minimum(seed_counts, token_counts).tolist()
        found.append((labels.cpu().numpy(), centroids.cpu().numpy(), counts))
    for view, mask in enumerate(unannotated):
        inside = int(mask.sum())
        own = [(labels[view][:inside], centroids[view, : counts[view]]) for labels, centroids, counts in found]
        clusters[view][mask], groups[view][mask] = _fused(tokens[view, :inside], own, config)
    return clusters, groups


def _prepare(
    dense_tokens: Tensor, unannotated: Tensor, config: PseudoLabels
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Unannotated tokens (B, n, C) at length 1, then zeros; for each K-means its seeds.

    Those are (B, k, C), then zeros, and how many they are, (B,).
    """
    flat = unannotated.flatten().nonzero()[:, 0]
    free = unit_length(dense_tokens.flatten(0, 2).index_select(0, flat))
    everything = config.seed_tokens == "all"
    if everything:
        grid = unit_length(dense_tokens)
    else:
        grid = torch.zeros_like(dense_tokens).flatten(0, 2).index_add_(0, flat, free).view_as(dense_tokens)
    if not (grid if everything else free).sum().isfinite():
        raise UserError("the teacher gave dense tokens that are not finite: check its weights (teacher)")
    together = [config.windows] if config.kmeans == "joint" else [(window,) for window in config.windows]
    scales = []
    for windows in together:
        seeds, counts = window_seeds(grid, unannotated, windows, everything)
        scales.append((seeds[:, : int(counts.max())], counts))
    most = sum(seeds.shape[1] for seeds, _ in scales)
    if most > ANNOTATED:
        raise UserError(
            f"pseudo_labels.windows {list(config.windows)} give {most} seeds on a grid of {grid.shape[1]}, "
            f"and at most {ANNOTATED} fit: choose larger windows"
        )
    return pad_sequence(free.split(unannotated.flatten(1).sum(dim=1).tolist()), batch_first=True), scales


def _fused(
    tokens: Tensor, scales: list[tuple[np.ndarray, np.ndarray]], config: PseudoLabels
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (n, C); labels (n,) and centroids (k, C) of each K-means -> labels and groups (n,)."""
    labels, centroids = scales[0] if len(scales) == 1 else _joined(tokens, scales)
    return labels, fuse(centroids, np.bincount(labels, minlength=len(centroids)), config.threshold)[labels]


def _joined(tokens: Tensor, scales: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The clusters of all scales as one list; a token keeps the nearest of those it belongs to, the first of equals."""
    exact = tokens.cpu().numpy().astype(np.float64)
    near = np.stack([(exact * centroids[labels]).sum(axis=1) for labels, centroids in scales])  # (scales, n)
    choice = (near >= near.max(axis=0) - TIE).argmax(axis=0)
    first = np.cumsum([0, *(len(centroids) for _, centroids in scales[:-1])])
    labels = np.stack([labels + start for (labels, _), start in zip(scales, first, strict=True)])
    return labels[choice, np.arange(len(tokens))], np.concatenate([centroids for _, centroids in scales])
