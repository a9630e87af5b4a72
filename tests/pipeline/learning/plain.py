"""NEL and cross-entropy as plain torch on whole logits at label size: what pixel_loss.py must equal."""

import torch
from torch import Tensor, nn

from pipeline.learning.labels import UNLABELLED
from pipeline.learning.losses import classify

FOCAL_WEIGHT, FOCAL_ALPHA, FOCAL_GAMMA = 100.0, 0.25, 2.0


def pixel_losses(
    features: Tensor,
    text_seen: Tensor,
    prototypes: Tensor,
    alpha: Tensor,
    beta: float,
    labels: Tensor,
    nel_channels: int | None = None,
) -> dict[str, Tensor]:
    """Of the arguments of `pixel_sums`, both losses, divided by what they are to be divided by."""
    logits = classify(features, text_seen, prototypes, alpha, beta)
    if logits.shape[2:] != labels.shape[1:]:
        logits = nn.functional.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    own = labels if nel_channels is None else labels.where(labels < nel_channels, UNLABELLED)
    return {"nel": nel(logits[:, :nel_channels], own), "ce": pixel_cross_entropy(logits, labels)}


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
