"""Losses of the Pixel Learning Module: Eq. 6, Eq. 7, cross-entropy, and NEL as in ZegCLIP."""

import torch
from torch import Tensor, nn

from pipeline.learning.labels import UNLABELLED

# ZegCLIP's NEL: 100 x sigmoid focal loss + 1 x dice loss.
FOCAL_WEIGHT, FOCAL_ALPHA, FOCAL_GAMMA = 100.0, 0.25, 2.0


def prototype_bce(prototypes: Tensor, classes: Tensor, text_seen: Tensor) -> Tensor:
    """Eq. 6: mean binary cross-entropy of sigmoid(t . p) over all pairs; a prototype's own class 1, the others 0.

    Args:
        prototypes: (P, C), of the seen classes present in the batch; P = 0 gives 0.
        classes: (P,) index of each prototype's class in `text_seen`.
        text_seen: (K, C).
    """
    if not len(prototypes):
        return prototypes.sum()
    own = nn.functional.one_hot(classes, len(text_seen)).to(prototypes.dtype)
    return nn.functional.binary_cross_entropy_with_logits(prototypes @ text_seen.T, own)


def classify(features: Tensor, text_seen: Tensor, prototypes: Tensor, alpha: Tensor, beta: float) -> Tensor:
    """Eq. 7: cat(alpha R . T_seen, beta cos(R, P_pseudo)).

    Args:
        features: (B, C, h, w). text_seen: (K, C). prototypes: (P, C), P may be 0.

    Returns:
        (B, K + P, h, w).
    """
    seen = alpha * torch.einsum("bchw,kc->bkhw", features, text_seen)
    unit_features = nn.functional.normalize(features, dim=1)
    pseudo = beta * torch.einsum("bchw,pc->bphw", unit_features, nn.functional.normalize(prototypes, dim=1))
    return torch.cat([seen, pseudo], dim=1)


def pixel_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over labelled pixels, 0 when there are none. (B, N, H, W), (B, H, W)."""
    total = nn.functional.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum")
    return total / (labels != UNLABELLED).sum().clamp(min=1)


def nel(logits: Tensor, labels: Tensor) -> Tensor:
    """ZegCLIP's non-mutually-exclusive loss: sigmoid focal loss over all channels + dice over the classes present.

    Both are divided by the number of (image, class) pairs present, at least 1; focal is a mean over pixels and a sum
    over images and channels. Unlabelled pixels are negatives of every class.

    Args:
        logits: (B, N, H, W). labels: (B, H, W), 0..N-1 or UNLABELLED.
    """
    batch, channels, height, width = logits.shape
    labelled = labels != UNLABELLED
    image = torch.arange(batch, device=labels.device)[:, None, None].expand_as(labels)
    present = torch.bincount((image * channels + labels)[labelled], minlength=batch * channels) > 0
    pairs = present.view(batch, channels).nonzero()
    count = max(len(pairs), 1)

    def negative(x: Tensor) -> Tensor:
        return (1 - FOCAL_ALPHA) * x.sigmoid() ** FOCAL_GAMMA * nn.functional.softplus(x)

    def positive(x: Tensor) -> Tensor:
        return FOCAL_ALPHA * (-x).sigmoid() ** FOCAL_GAMMA * nn.functional.softplus(-x)

    # Every entry as a negative, then the labelled pixels' own entries corrected: no one-hot target is ever built.
    own = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0][labelled]
    focal = (negative(logits).sum() + (positive(own) - negative(own)).sum()) / (height * width)

    score = logits[pairs[:, 0], pairs[:, 1]].sigmoid().flatten(1)  # (pairs, H * W)
    target = (labels[pairs[:, 0]] == pairs[:, 1, None, None]).flatten(1)
    intersection = (score * target).sum(dim=1)
    dice = (1 - (2 * intersection + 1) / (score.sum(dim=1) + target.sum(dim=1) + 1)).sum()
    return (FOCAL_WEIGHT * focal + dice) / count
