"""Local distillation: the features of each region are pulled to what the teacher saw there.

Not in the paper, whose CLS tokens say what is in an image; of a class without masks nothing says where. The authors'
journal version (CLIP-to-Seg Distillation, IEEE TCSVT 2025, of which the abstract is known here) adds a local
distillation of object-level features over pseudo masks. The form below was chosen by measurement
(benchmarks/local_forms.md); distilling similarities is SEED's idea (Fang et al. 2021).
"""

import torch
from torch import Tensor, nn

from pipeline.learning.labels import ANNOTATED
from pipeline.learning.ranks import gathered


def tokens_of_groups(region_tokens: Tensor, groups: Tensor) -> Tensor:
    """The region tokens of all groups of the batch, on all ranks, in the order of `fuse_labels`.

    Args:
        region_tokens: (B, M, C), row g of group g; M is the most groups that a view can have.
        groups: (B, G, G) uint8 groups of tokens, 255 = annotated.

    Returns:
        (P, C).
    """
    numbers = torch.where(groups == ANNOTATED, -1, groups.long()).amax(dim=(1, 2), keepdim=True)[..., 0]  # (B, 1)
    there = gathered((torch.arange(region_tokens.shape[1], device=groups.device) <= numbers).to(torch.uint8))
    return gathered(region_tokens)[there.bool()]


def region_loss(centroids: Tensor, region_tokens: Tensor, text_seen: Tensor, tau: float) -> Tensor:
    """How far each region is from being as like all regions of the batch as the teacher finds it.

    Mean over regions i of KL(softmax_j(t_i . t_j / tau) || softmax_j(p_i . t_j / tau)), p and t at unit length: InfoNCE
    of regions whose targets are the teacher's own similarities. Regions of one class, which are many in a batch, are
    thus no negatives of each other.

    What p and t have along the mean direction of `text_seen` is left out first. NEL lowers the logits of all seen
    classes on unannotated pixels, and classes' text features point nearly one way (mean cosines of 0.8), which the
    teacher's tokens hardly have: NEL moves R along that direction, against t, where it tells no class from another.

    Args:
        centroids: (P, C) p, the mean feature R of each region (Eq. 5).
        region_tokens: (P, C) t, the teacher's mean dense token there at any length; zero where it has no direction:
            these regions take no part.
        text_seen: (K, C).
        tau: temperature.

    Returns:
        A scalar; 0 where no region takes part.
    """
    told = region_tokens.any(dim=1)
    common = nn.functional.normalize(text_seen.mean(dim=0), dim=0)
    p, t = (
        nn.functional.normalize(vectors - (vectors @ common)[:, None] * common, dim=1)
        for vectors in (centroids[told], region_tokens[told].to(common.dtype))
    )
    found, wanted = ((vectors @ t.T / tau).log_softmax(dim=1) for vectors in (p, t))
    return nn.functional.kl_div(found, wanted, reduction="sum", log_target=True) / told.sum().clamp(min=1)
