"""NEL (as in ZegCLIP) and cross-entropy of Eq. 8 on logits at label size, computed band by band to save memory.

Upsampled logits are 16 times larger than those at the features' stride 4, and a direct implementation needs seven
tensors of that size. Here they are computed in bands of rows of one image, once for the losses and again for the
gradient. Four reductions per band are kept; both losses follow from these by simple formulas.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pipeline.learning.labels import UNLABELLED
from pipeline.learning.losses import classify
from pipeline.learning.ranks import mean_count

# ZegCLIP's NEL: 100 x sigmoid focal loss + 1 x dice loss.
FOCAL_WEIGHT, FOCAL_ALPHA, FOCAL_GAMMA = 100.0, 0.25, 2.0
# Logits of a band: a CPU's caches hold a few tensors of it; a GPU needs many for each of the kernels it starts.
CPU_BAND, GPU_BAND = 2**19, 2**24


def count_labelled(labels: Tensor) -> Tensor:
    """Number of labelled pixels, the divisor of cross-entropy; see `mean_count`. (B, H, W) -> ()."""
    return mean_count((labels != UNLABELLED).sum())


def count_pairs(labels: Tensor, channels: int) -> Tensor:
    """Number of (image, class) pairs present among the first `channels` classes, the divisor of NEL.

    See `mean_count`. (B, H, W) -> ().
    """
    return mean_count(torch.stack([(_sizes(image, channels) > 0).sum() for image in labels]).sum())


def pixel_sums(
    features: Tensor,
    text_seen: Tensor,
    prototypes: Tensor,
    alpha: Tensor,
    beta: float,
    labels: Tensor,
    nel_channels: int,
    ce: bool = True,
) -> dict[str, Tensor]:
    """NEL and cross-entropy of the logits of Eq. 7, upsampled bilinearly to the labels' size, before division.

    nel: 100 x sigmoid focal loss, averaged over pixels and summed over images and channels (pixels of no channel are
    negatives of all), + dice over the classes present in each image. To be divided by `count_pairs`.
    ce: cross-entropy summed over labelled pixels. To be divided by `count_labelled`.

    After the logits at the features' size, where autocast may apply, everything is computed in float32 (or float64).

    Args:
        features: (B, C, h, w). text_seen: (K, C). prototypes: (P, C), P may be 0. alpha, beta: as `classify` takes.
        labels: (B, H, W), 0..K+P-1 or UNLABELLED.
        nel_channels: how many of the first channels NEL uses: K+P for all, 0 for no NEL.
        ce: whether to compute cross-entropy, which uses all channels.

    Returns:
        The scalars by name.
    """
    sums: dict[str, list[Tensor]] = {"nel": [], "ce": []}
    of_batch = classify(features, text_seen, prototypes, alpha, beta).permute(0, 2, 3, 1).contiguous()
    of_batch = of_batch.to(torch.promote_types(of_batch.dtype, torch.float32))
    for logits, own_labels in zip(of_batch, labels, strict=True):
        sizes = _sizes(own_labels, nel_channels)
        present = sizes.nonzero()[:, 0]
        negatives, scores, own, log_sum = _Upsampled.apply(logits, own_labels, present, nel_channels, ce)
        labelled = own_labels != UNLABELLED
        if nel_channels:
            # Every logit as a negative, then the labelled pixels' own corrected: no one-hot target is ever built.
            positive = labelled & (own_labels < nel_channels)
            corrections = torch.where(positive, _positive(own) - _negative(own), 0.0).sum()
            focal = (negatives + corrections) / own.numel()
            hits = torch.where(positive, own.sigmoid(), 0.0).flatten()
            intersections = hits.new_zeros(logits.shape[2]).index_add(0, own_labels.clamp(min=0).flatten(), hits)
            dice = (1 - (2 * intersections[present] + 1) / (scores + sizes[present] + 1)).sum()
            sums["nel"].append(FOCAL_WEIGHT * focal + dice)
        if ce:
            sums["ce"].append(torch.where(labelled, log_sum - own, 0.0).sum())
    return {name: torch.stack(values).sum() for name, values in sums.items() if values}


def _sizes(labels: Tensor, channels: int) -> Tensor:
    """(H, W) -> (channels,) pixels of each of the first classes."""
    return torch.bincount((labels + 1).flatten(), minlength=channels + 1)[1 : channels + 1]


def _negative(x: Tensor) -> Tensor:
    return (1 - FOCAL_ALPHA) * x.sigmoid() ** FOCAL_GAMMA * F.softplus(x)


def _positive(x: Tensor) -> Tensor:
    return FOCAL_ALPHA * (-x).sigmoid() ** FOCAL_GAMMA * F.softplus(-x)


class _Upsampled(torch.autograd.Function):
    """Reductions of one image's logits, upsampled bilinearly; the gradient upsamples them once more.

    Rows are upsampled first, of all the image, then columns, of a band: bilinear interpolation is separable.

    Args:
        logits: (h, w, N), channels last: so upsampling costs a CPU next to nothing. labels: (H, W).
        present: (M,) of the first `count` channels, which NEL is of. ce: whether cross-entropy is wanted.

    Returns:
        The focal loss of those channels' upsampled logits as negatives, a sum; (M,) sigmoids summed over pixels; (H, W)
        the logit of the label, of channel 0 where there is none; (H, W) log-sum-exp over all channels, zero without
        `ce`.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, present: Tensor, count: int, ce: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        negatives, scores = logits.new_zeros(()), logits.new_zeros(len(present))
        own, log_sum = logits.new_zeros(labels.shape), logits.new_zeros(labels.shape)
        tall = _resize(logits, len(labels), logits.shape[1])
        for rows in _bands(logits, labels):
            x = _resize(tall[rows], len(labels[rows]), labels.shape[1])
            own[rows] = x.gather(2, labels[rows, :, None].clamp(min=0))[..., 0]
            if ce:
                log_sum[rows] = x.logsumexp(2)
            if count:
                first = x[..., :count]
                score = first.sigmoid()
                scores += score.index_select(2, present).sum(dim=(0, 1))
                negatives += F.softplus(first).mul_(score).mul_(score).sum()
        ctx.save_for_backward(logits, labels, present, log_sum)
        ctx.wanted = count, ce
        return negatives.mul_(1 - FOCAL_ALPHA), scores, own, log_sum

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_negatives: Tensor, of_scores: Tensor, of_own: Tensor, of_log_sum: Tensor
    ) -> tuple[Tensor | None, ...]:
        logits, labels, present, log_sum = ctx.saved_tensors
        count, ce = ctx.wanted
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            tall = _resize(leaf, len(labels), logits.shape[1])
        of_tall = torch.empty_like(tall)
        for rows in _bands(logits, labels):
            with torch.enable_grad():
                band = tall[rows].detach().requires_grad_()
                wide = _resize(band, len(labels[rows]), labels.shape[1])
            x = wide.detach()
            gradient = torch.zeros_like(x)
            if count:
                first = x[..., :count]
                score = first.sigmoid()
                gradient[..., :count] = _negative_gradient(first, score).mul_(of_negatives)
                few = score.index_select(2, present)
                gradient.index_add_(2, present, of_scores * few * (1 - few))
            if ce:
                gradient.addcmul_(x.sub_(log_sum[rows, :, None]).exp_(), of_log_sum[rows, :, None])
            gradient.scatter_add_(2, labels[rows, :, None].clamp(min=0), of_own[rows, :, None])
            of_tall[rows] = torch.autograd.grad(wide, band, gradient)[0]
        return *torch.autograd.grad(tall, leaf, of_tall), None, None, None, None


def _negative_gradient(x: Tensor, score: Tensor) -> Tensor:
    """That of `_negative`: with s = sigmoid(x) and gamma = 2, (1 - alpha) s^2 (s + 2 (1 - s) softplus(x))."""
    gradient = F.softplus(x)
    gradient.addcmul_(gradient, score, value=-1)
    torch.add(score, gradient, alpha=2, out=gradient)
    return gradient.mul_(score).mul_(score).mul_(1 - FOCAL_ALPHA)


def _resize(maps: Tensor, height: int, width: int) -> Tensor:
    """(h, w, N) -> (H, W, N)."""
    channels_first = maps.unsqueeze(0).permute(0, 3, 1, 2)
    resized = F.interpolate(channels_first, (height, width), mode="bilinear", align_corners=False)
    return resized.squeeze(0).permute(1, 2, 0)


def _bands(logits: Tensor, labels: Tensor) -> list[slice]:
    height, width = labels.shape
    step = max(1, (CPU_BAND if logits.device.type == "cpu" else GPU_BAND) // (logits.shape[2] * width))
    return [slice(top, top + step) for top in range(0, height, step)]
