"""Eq. 6 and Eq. 7 of the Pixel Learning Module; the losses on Eq. 7's logits are in pixel_loss.py."""

import torch
from torch import Tensor, nn


def prototype_bce(prototypes: Tensor, classes: Tensor, text_seen: Tensor, negatives: bool = True) -> Tensor:
    """Eq. 6: mean binary cross-entropy of sigmoid(t . p) over all pairs; a prototype's own class 1, the others 0.

    Without `negatives` over the pairs of a prototype and its own class alone.

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
    seen = alpha * torch.einsum("bchw,kc->bkhw", features, text_seen)
    unit_features = nn.functional.normalize(features, dim=1)
    pseudo = beta * torch.einsum("bchw,pc->bphw", unit_features, nn.functional.normalize(prototypes, dim=1))
    return torch.cat([seen, pseudo], dim=1)
