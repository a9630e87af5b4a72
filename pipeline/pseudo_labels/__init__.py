"""Pseudo labels of one view: multi-scale seeds (Eq. 4) -> K-means -> mask fusion, on unannotated tokens only."""

import numpy as np

from configs.errors import UserError
from configs.schema import PseudoLabels
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
    """
    clusters = np.full(unannotated.shape, ANNOTATED, np.uint8)
    groups = clusters.copy()
    if unannotated.any():
        tokens = unit_length(dense_tokens)
        seeds = window_seeds(tokens, unannotated, config.windows)
        if len(seeds) > ANNOTATED:
            raise UserError(
                f"pseudo_labels.windows {list(config.windows)} give {len(seeds)} seeds on a grid of {len(tokens)}, "
                f"and at most {ANNOTATED} fit: choose larger windows"
            )
        labels, centroids = kmeans(tokens[unannotated], seeds, config.iterations)
        group_of = fuse(centroids, np.bincount(labels, minlength=len(centroids)), config.threshold)
        clusters[unannotated] = labels
        groups[unannotated] = group_of[labels]
    return clusters, groups
