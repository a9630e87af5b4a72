"""NEL (as in ZegCLIP) and cross-entropy of Eq. 8 on logits at label size, of which no tensor is ever made whole.

Upsampled logits are 16 times larger than those at the features' stride 4, and a direct implementation needs seven
tensors of that size. Here a few reductions of them are computed, and both losses follow from these by simple formulas:
in bands of rows by torch (pixel_bands.py), or on an NVIDIA GPU by two kernels (pixel_kernels.py).
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.learning import pixel_bands
from pipeline.learning.losses import classify
from pipeline.learning.ranks import mean_count

FOCAL_WEIGHT = 100.0  # ZegCLIP's NEL: 100 x sigmoid focal loss + 1 x dice loss

try:
    from pipeline.learning import pixel_kernels
except ImportError:  # no Triton for this system
    pixel_kernels = None  # type: ignore[assignment]


def pixel_losses(
    features: Tensor,
    text_seen: Tensor,
    prototypes: Tensor,
    alpha: Tensor,
    beta: float,
    labels: Tensor,
    nel_channels: int,
    ce: bool = True,
) -> dict[str, Tensor]:
    """NEL and cross-entropy of the logits of Eq. 7, upsampled bilinearly to the labels' size.

    nel: 100 x sigmoid focal loss, averaged over pixels and summed over images and channels (pixels of no channel are
    negatives of all), + dice over the classes present in each image; divided by the number of (image, class) pairs
    present. ce: the mean over labelled pixels. Of the divisors see `mean_count`.

    After the logits at the features' size, where autocast may apply, everything is computed in float32 (or float64).

    Args:
        features: (B, C, h, w). text_seen: (K, C). prototypes: (P, C), P may be 0. alpha, beta: as `classify` takes.
        labels: (B, H, W), 0..K+P-1 or UNLABELLED.
        nel_channels: how many of the first channels NEL uses: K+P for all, 0 for no NEL.
        ce: whether to compute cross-entropy, which uses all channels.

    Returns:
        The scalars by name.
    """
    logits = classify(features, text_seen, prototypes, alpha, beta).permute(0, 2, 3, 1).contiguous()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    sizes = class_sizes(labels, logits.shape[3])
    of_nel = sizes[:, :nel_channels]
    present = of_nel > 0
    pairs, labelled = mean_count(torch.stack([present.sum(), sizes.sum()])).to(logits.dtype)
    focal, scores, own, entropies = Reductions.apply(logits, labels, nel_channels, ce)
    losses = {}
    if nel_channels:
        index = labels.clamp(0, nel_channels - 1)
        hits = (labels == index) * own.sigmoid()
        intersections = torch.zeros_like(scores).scatter_add(1, index.flatten(1), hits.flatten(1))
        dice = (present * (1 - (2 * intersections + 1) / (scores + of_nel + 1))).sum()
        losses["nel"] = torch.add(dice, focal, alpha=FOCAL_WEIGHT / labels[0].numel()) / pairs
    if ce:
        losses["ce"] = entropies / labelled
    return losses


def class_sizes(labels: Tensor, channels: int) -> Tensor:
    """(B, H, W) of -1 to channels - 1 -> (B, channels) int64, pixels of each class in each image."""
    rows = (labels + 1).flatten(1)
    return rows.new_zeros(len(rows), channels + 1).scatter_add_(1, rows, torch.ones_like(rows))[:, 1:]


def way(logits: Tensor) -> ModuleType:
    """The module that reduces them: on an NVIDIA GPU the kernels, elsewhere the bands."""
    if pixel_kernels and logits.is_cuda and logits.dtype == torch.float32:
        return pixel_kernels
    return pixel_bands


class Reductions(torch.autograd.Function):
    """Reductions of the logits x upsampled bilinearly to the labels' size, with s = sigmoid(x).

    Args:
        logits: (B, h, w, N) contiguous: channels last, so upsampling costs a CPU next to nothing. labels: (B, H, W).
        count: focal, scores and own logits are of the first `count` channels. ce: whether entropies are wanted.

    Returns:
        focal (): (1 - s)^2 softplus(-x) / 4 of a pixel's label and 3/4 s^2 softplus(x) of other channels, summed over
        channels and pixels. scores (B, count): s summed over pixels. own (B, H, W): x of the pixel's label, of any
        channel where that is none of the first. entropies (): log-sum-exp over all channels - x of the label, summed
        over labelled pixels. Zeros where they are not wanted.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, count: int, ce: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.way = way(logits)
        found, kept = ctx.way.reductions(logits, labels, count, ce)
        ctx.save_for_backward(labels, *kept)
        ctx.wanted = count, ce, logits.shape
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        labels, *kept = ctx.saved_tensors
        count, ce, shape = ctx.wanted
        return ctx.way.gradient(labels, kept, count, ce, shape, *gradients), None, None, None
