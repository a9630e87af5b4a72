"""Local distillation: aligns the features of each region with the teacher's tokens there.

Not in the paper. Its CLS tokens say what is in an image, but for classes without masks nothing says where. The authors'
journal version (CLIP-to-Seg Distillation, IEEE TCSVT 2025; only the abstract was available) adds a local distillation
of object-level features over pseudo masks. The form below was chosen by measurement (benchmarks/local_forms.md).
"""

import torch
from torch import Tensor, nn

from pipeline.learning.ranks import gathered
from pipeline.transfer import sent

SKIPPED = -1


def tokens_of_groups(region_tokens: Tensor, groups: Tensor) -> Tensor:
    """The region tokens of all groups of the batch, on all ranks, in the order of `fuse_labels`.

    Args:
        region_tokens: (B, M, C), row g of group g; M is the maximum number of groups in a view.
        groups: (ranks x B,) how many groups each view has, on the CPU.

    Returns:
        (P, C).
    """
    there = torch.arange(region_tokens.shape[1]) < groups[:, None]
    rows = there.flatten().nonzero()[:, 0]
    return gathered(region_tokens).flatten(0, 1)[sent(rows, region_tokens.device)]


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
    told = region_tokens.any(dim=1)
    unit = nn.functional.normalize(region_tokens.to(centroids.dtype), dim=1) / tau
    logits = nn.functional.normalize(centroids, dim=1) @ unit.T
    # Skipped regions are no candidates. They are not -inf, as rows that do not count must be finite too.
    logits = logits.masked_fill(~told, torch.finfo(logits.dtype).min)
    own = torch.arange(len(told), device=told.device).masked_fill(~told, SKIPPED)
    total = nn.functional.cross_entropy(logits, own, ignore_index=SKIPPED, reduction="sum")
    return total / told.sum().clamp(min=1)
