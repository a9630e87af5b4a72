"""Pseudo labels of views: multi-scale seeds (Eq. 4) -> K-means -> mask fusion, on unannotated tokens only."""

import math

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import PseudoLabels
from pipeline.pseudo_labels.fusion import fuse
from pipeline.pseudo_labels.kmeans import KMEANS, TIE, Clusters, KMeans, lengths
from pipeline.pseudo_labels.seeds import window_seeds

ANNOTATED = 255


def kmeans_on(device: str) -> str:
    """The K-means that a device uses by default: "torch" on CUDA, otherwise "faiss" (MPS has no float64)."""
    return "torch" if device.startswith("cuda") else "faiss"


@torch.inference_mode()
def pseudo_labels(
    dense_tokens: Tensor, unannotated: np.ndarray, config: PseudoLabels, kmeans: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Clusters and fused groups of the unannotated tokens of a batch of views.

    FAISS processes one view after the other, in float32 on the CPU. Torch processes all views at once, in float64, so
    that the order of additions does not change labels. Either way, a view's labels do not depend on the other views.

    Args:
        dense_tokens: (B, G, G, C) float32, not normalised, on any device.
        unannotated: (B, G, G) bool.
        kmeans: "faiss" or "torch"; by default `kmeans_on` the tokens' device.

    Returns:
        K-means labels and fused groups, each (B, G, G) uint8 from 0, ANNOTATED (255) elsewhere.

    Raises:
        UserError: there are more seeds than 8-bit labels, or a token that is used is not finite.
    """
    kmeans = kmeans or kmeans_on(dense_tokens.device.type)
    clusters = np.full(unannotated.shape, ANNOTATED, np.uint8)
    groups = clusters.copy()
    dense_tokens, step = (dense_tokens.cpu(), 1) if kmeans == "faiss" else (dense_tokens.double(), len(unannotated))
    for start in range(0, len(unannotated), step or 1):
        masks = unannotated[start : start + step]
        free = torch.from_numpy(masks).to(dense_tokens.device)
        found = _cluster(dense_tokens[start : start + step], free, config, KMEANS[kmeans])
        for view, (mask, (labels, centroids)) in enumerate(zip(masks, found, strict=True), start):
            sizes = np.bincount(labels, minlength=len(centroids))
            clusters[view][mask], groups[view][mask] = labels, fuse(centroids, sizes, config.threshold)[labels]
    return clusters, groups


def _cluster(dense_tokens: Tensor, unannotated: Tensor, config: PseudoLabels, kmeans: KMeans) -> list[Clusters]:
    """The clusters of each view's unannotated tokens, before fusion."""
    everything = config.seed_tokens == "all"
    length = lengths(dense_tokens)
    if not math.isfinite((length if everything else length[unannotated]).sum()):
        raise UserError("the teacher gave dense tokens that are not finite: check its weights (teacher)")
    tokens = dense_tokens / length
    free = tokens if unannotated.all() else tokens.masked_fill(~unannotated[..., None], 0)
    grid = tokens if everything else free
    together = [config.windows] if config.kmeans == "joint" else [(window,) for window in config.windows]
    scales = [window_seeds(grid, unannotated, windows, everything) for windows in together]
    most = sum(int(counts.max()) for _, counts in scales)
    if most > ANNOTATED:
        raise UserError(
            f"pseudo_labels.windows {list(config.windows)} give {most} seeds on a grid of {tokens.shape[1]}, "
            f"and at most {ANNOTATED} fit: choose larger windows"
        )
    flat, inside = free.flatten(1, 2), unannotated.flatten(1)
    found = [kmeans(flat, inside, seeds, counts, config.iterations) for seeds, counts in scales]
    if len(found) == 1:
        return found[0]
    return [_joined(own[mask], of_scales) for own, mask, *of_scales in zip(flat, inside, *found, strict=True)]


def _joined(tokens: Tensor, scales: list[Clusters]) -> Clusters:
    """All scales' clusters as one list; each token is assigned to the nearest of its clusters (ties: the first)."""
    exact = tokens.double().cpu().numpy()
    near = np.stack([(exact * centroids[labels]).sum(axis=1) for labels, centroids in scales])  # (scales, n)
    choice = (near >= near.max(axis=0) - TIE).argmax(axis=0)
    first = np.cumsum([0, *(len(centroids) for _, centroids in scales[:-1])])
    labels = np.stack([labels + start for (labels, _), start in zip(scales, first, strict=True)])
    return labels[choice, np.arange(len(tokens))], np.concatenate([centroids for _, centroids in scales])
