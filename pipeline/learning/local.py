"""Local distillation: features of each region are pulled to what the teacher saw there.

Not in the paper. Its CLS token says what is in an image; for classes without a mask nothing says where. The authors'
journal version (CLIP-to-Seg Distillation, IEEE TCSVT 2025) adds a local distillation with object-level features over
pseudo masks, of which the abstract is known here; the form below was measured (docs/evidence.md).
"""

import torch
from torch import Tensor, nn


def region_loss(centroids: Tensor, region_tokens: Tensor) -> Tensor:
    """Mean over the regions of 1 - cosine(p, t).

    Args:
        centroids: (P, C) p, the mean feature R of each group of the batch (Eq. 5).
        region_tokens: (P, C) t, the direction of the teacher's mean dense token there; zero where it has none.

    Returns:
        A scalar; 0 without a region that has a direction.
    """
    told = region_tokens.any(dim=1)
    cosines = nn.functional.cosine_similarity(centroids, region_tokens.to(centroids.dtype), dim=1)
    return torch.where(told, 1 - cosines, 0.0).sum() / told.sum().clamp(min=1)
