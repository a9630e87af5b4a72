"""Local distillation: the features of each region are pulled to what the teacher saw there.

Not in the paper, whose CLS tokens say what is in an image; of a class without masks nothing says where. The authors'
journal version (CLIP-to-Seg Distillation, IEEE TCSVT 2025, of which the abstract is known here) adds a local
distillation of object-level features over pseudo masks. The form below was chosen by measurement
(benchmarks/local_forms.md).
"""

import torch
from torch import Tensor

from pipeline.learning.glm import info_nce
from pipeline.learning.labels import group_counts
from pipeline.learning.ranks import gathered


def tokens_of_groups(region_tokens: Tensor, groups: Tensor) -> Tensor:
    """The region tokens of all groups of the batch, on all ranks, in the order of `fuse_labels`.

    Args:
        region_tokens: (B, M, C), row g of group g; M is the most groups that a view can have.
        groups: (B, G, G) uint8 groups of tokens, 255 = annotated.

    Returns:
        (P, C).
    """
    numbers = torch.arange(region_tokens.shape[1], device=groups.device)
    there = gathered((numbers < group_counts(groups)[:, None]).to(torch.uint8))
    return gathered(region_tokens)[there.bool()]


def region_loss(centroids: Tensor, region_tokens: Tensor, tau: float) -> Tensor:
    """Eq. 3 of regions: each mean feature R finds the teacher's token of its region among those of all regions.

    Args:
        centroids: (P, C) mean feature of each region of the batch (Eq. 5).
        region_tokens: (P, C) the teacher's mean dense token there, at any length; zero where it has no direction: these
            regions take no part.
        tau: temperature.

    Returns:
        A scalar; 0 where no region takes part.
    """
    told = region_tokens.any(dim=1).nonzero()[:, 0]
    if not len(told):
        return centroids.sum() * 0
    own = region_tokens[told].to(centroids.dtype)
    return info_nce(centroids[told], own, own[:0], tau, told, told[:0])
