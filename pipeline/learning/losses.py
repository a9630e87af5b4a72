"""Eq. 6 and Eq. 7 of the Pixel Learning Module; the losses on Eq. 7's logits are in pixel_loss.py."""

import torch
from torch import Tensor, nn

EPSILON = 1e-12  # the least length that a vector is divided by, torch's own


def prototype_bce(prototypes: Tensor, classes: Tensor, text_seen: Tensor, negatives: bool = True) -> Tensor:
    """Eq. 6: mean binary cross-entropy of sigmoid(t . p) over all pairs; a prototype's own class 1, the others 0.

    Without `negatives`, only over the pairs of a prototype and its own class.

    Args:
        prototypes: (P, C), of the seen classes present in the batch; P = 0 gives 0.
        classes: (P,) index of each prototype's class in `text_seen`.
        text_seen: (K, C).
    """
    if not len(prototypes):
        return prototypes.sum()
    if not negatives:
        return nn.functional.softplus(-(prototypes * text_seen[classes]).sum(dim=1)).mean()
    own = nn.functional.one_hot(classes, len(text_seen)).to(prototypes.dtype)
    return nn.functional.binary_cross_entropy_with_logits(prototypes @ text_seen.T, own)


def classify(features: Tensor, text_seen: Tensor, prototypes: Tensor, alpha: Tensor, beta: float) -> Tensor:
    """Eq. 7: cat(alpha R . T_seen, beta cos(R, P_pseudo)).

    Args:
        features: (B, C, h, w). text_seen: (K, C). prototypes: (P, C), P may be 0.

    Returns:
        (B, K + P, h, w).
    """
    flat = channels_last(features)
    channels = torch.cat([text_seen, nn.functional.normalize(prototypes, dim=1)])
    products = flat @ channels.T.to(flat.dtype)  # one product for both: R is read once, and its gradient written once
    length = torch.linalg.vector_norm(flat, dim=2, keepdim=True).clamp(min=EPSILON)
    logits = torch.cat(
        [alpha * products[..., : len(text_seen)], beta * products[..., len(text_seen) :] / length], dim=2
    )
    return logits.unflatten(1, features.shape[2:]).permute(0, 3, 1, 2)


def channels_last(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C), without a copy, as the student's memory format is channels last.

    Every loss reads R through this function: adding gradients of one memory layout is several times faster than of two.
    """
    return features.permute(0, 2, 3, 1).flatten(1, 2)
