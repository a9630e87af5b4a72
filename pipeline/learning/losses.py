"""Eq. 6 and Eq. 7 of the Pixel Learning Module; the losses on Eq. 7's logits are in pixel_loss.py."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
    own = (classes[:, None] == torch.arange(len(text_seen), device=classes.device)).to(prototypes.dtype)
    return nn.functional.binary_cross_entropy_with_logits(prototypes @ text_seen.T, own)


def classify(features: Tensor, text_seen: Tensor, prototypes: Tensor, alpha: Tensor, beta: float) -> Tensor:
    """Eq. 7: cat(alpha R . T_seen, beta cos(R, P_pseudo)).

    Args:
        features: (B, C, h, w). text_seen: (K, C). prototypes: (P, C), P may be 0.

    Returns:
        (B, K + P, h, w).
    """
    channels = torch.cat([alpha * text_seen, beta * nn.functional.normalize(prototypes, dim=1)])
    logits = _Classify.apply(channels_last(features), channels, len(text_seen))
    return logits.unflatten(1, features.shape[2:]).permute(0, 3, 1, 2)


class _Classify(torch.autograd.Function):
    """(B, L, C) features R, (N, C) channels -> (B, L, N) R . channels, from channel `seen` on divided by R's length.

    One product for both: R is read once more for its length, and its gradient is written once. Autograd would make six
    tensors of R's size out of the length alone.
    """

    @staticmethod
    def forward(ctx: Any, flat: Tensor, channels: Tensor, seen: int) -> Tensor:
        logits = (flat @ channels.T.to(flat.dtype)).to(torch.promote_types(flat.dtype, channels.dtype))
        length = torch.linalg.vector_norm(flat, dim=2, keepdim=True).clamp(min=EPSILON).to(logits.dtype)
        logits[..., seen:].div_(length)
        ctx.save_for_backward(flat, channels, length, logits)
        ctx.seen = seen
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        flat, channels, length, logits = ctx.saved_tensors
        of_length = (gradient[..., ctx.seen :] * logits[..., ctx.seen :]).sum(2, keepdim=True) / length
        gradient = gradient.clone()
        gradient[..., ctx.seen :].div_(length)
        gradient = gradient.to(flat.dtype)
        of_flat = gradient @ channels.to(flat.dtype)
        of_flat.addcmul_(flat, (of_length / length).masked_fill(length <= EPSILON, 0).to(flat.dtype), value=-1)
        return of_flat, (gradient.flatten(0, 1).T @ flat.flatten(0, 1)).to(channels.dtype), None


def channels_last(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C), without a copy, as the student's memory format is channels last.

    Every loss reads R through this function: adding gradients of one memory layout is several times faster than of two.
    """
    return features.permute(0, 2, 3, 1).flatten(1, 2)
