"""Local distillation: aligns the features of each region with the teacher's tokens there.

Not in the paper. Its CLS tokens say what is in an image, but for classes without masks nothing says where. The authors'
journal version (CLIP-to-Seg Distillation, IEEE TCSVT 2025; only the abstract was available) adds a local distillation
of object-level features over pseudo masks. The form below was chosen by measurement (benchmarks/local_forms.md).
"""

import torch
from torch import Tensor

from pipeline.learning.glm import info_nce
from pipeline.learning.labels import group_counts
from pipeline.learning.ranks import gathered


def tokens_of_groups(region_tokens: Tensor, groups: Tensor) -> Tensor:
    """The region tokens of all groups of the batch, on all ranks, in the order of `fuse_labels`.

    Args:
        region_tokens: (B, M, C), row g of group g; M is the maximum number of groups in a view.
        groups: (B, G, G) uint8 groups of tokens, 255 = annotated.

    Returns:
        (P, C).
    """
    numbers = torch.arange(region_tokens.shape[1], device=groups.device)
    there = gathered((numbers < group_counts(groups)[:, None]).to(torch.uint8))
    return gathered(region_tokens)[there.bool()]


def region_loss(centroids: Tensor, region_tokens: Tensor, tau: float) -> Tensor:
    """Eq. 3 on regions: each region's mean feature R must match its own region token among those of all regions.

    Args:
        centroids: (P, C) mean feature of each region of the batch (Eq. 5).
        region_tokens: (P, C) the teacher's mean dense token there, at any length; regions with a zero token are
            skipped.
        tau: temperature.

    Returns:
        A scalar; 0 if all regions are skipped.
    """
    told = region_tokens.any(dim=1).nonzero()[:, 0]
    if not len(told):
        return centroids.sum() * 0
    own = region_tokens[told].to(centroids.dtype)
    return info_nce(centroids[told], own, own[:0], tau, told, told[:0])
