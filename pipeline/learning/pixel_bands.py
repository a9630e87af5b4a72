"""The reductions of pixel_loss.py by torch, in bands: the way of CPUs, and what the kernels are tested against.

Each band is upsampled once. All gradients that will be needed are brought to the size of the features at once, as their
factors are known only when the whole image has been seen: U' g for the functions g of x below, where U upsamples.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.learning.labels import UNLABELLED

# Upsampled logits of a band: a CPU's caches hold a few tensors of it; a GPU needs many for each kernel it starts.
CPU_BAND, GPU_BAND = 2**19, 2**27
SINK = 1e30

Found = tuple[Tensor, Tensor, Tensor, Tensor]


def reductions(logits: Tensor, labels: Tensor, count: int, ce: bool) -> tuple[Found, list[Tensor]]:
    """What `pixel_loss.Reductions` returns, and what `gradient` needs: U' of the derivatives of each reduction.

    These are (B, h, w, count) of negatives and of scores, and (B, h, w, N + 1) of log-sum-exp over labelled pixels.
    """
    batch, height, width, channels = logits.shape
    negatives, scores, entropies = (logits.new_zeros(batch, *size) for size in ((), (count,), ()))
    own = logits.new_zeros(labels.shape)
    of_negatives, of_scores = (logits.new_empty(*logits.shape[:3], count) for _ in range(2))
    of_entropies = logits.new_empty(*logits.shape[:3], (channels + 1) * ce)
    wide = labels.shape[2]
    for images, bands in _bands(logits, labels):
        if ce:
            # A channel more, which takes all of an unlabelled pixel's probability: its gradient is zero without a mask.
            tall = _resize(F.pad(logits[images], (0, 1)), labels.shape[1], width)
            of_tall = torch.empty_like(tall)
            for rows in bands:
                x, label = _resize(tall[:, rows], -1, wide), labels[images, rows]
                labelled = label != UNLABELLED
                x[..., -1] = torch.where(labelled, -SINK, SINK)
                log_p = x.log_softmax(3)
                own_log_p = log_p.gather(3, label.clamp(min=0)[..., None])[..., 0]
                entropies[images] -= torch.where(labelled, own_log_p, 0.0).sum((1, 2))
                of_tall[:, rows] = _resized_gradient(log_p.exp_(), -1, width)
            of_entropies[images] = _resized_gradient(of_tall, height, -1)
        if count:
            tall = _resize(logits[images][..., :count].contiguous(), labels.shape[1], width)
            of_tall, of_tall_scores = torch.empty_like(tall), torch.empty_like(tall)
            for rows in bands:
                x, label = _resize(tall[:, rows], -1, wide), labels[images, rows]
                own[images, rows] = x.gather(3, label.clamp(0, count - 1)[..., None])[..., 0]
                # n = s^2 softplus(x); n' = s^3 + 2 s^2 (1 - s) softplus(x) = 2 n + s (s^2 - 2 n); s' = s - s^2.
                s, n = x.sigmoid(), F.softplus(x)
                square = s * s
                n.mul_(square)
                of_s, of_square, of_n = (_resized_gradient(g, -1, width) for g in (s, square, n))
                of_rest = _resized_gradient(square.sub_(n, alpha=2).mul_(s), -1, width)
                torch.add(of_rest, of_n, alpha=2, out=of_tall[:, rows])
                torch.sub(of_s, of_square, out=of_tall_scores[:, rows])
                negatives[images] += of_n.sum((1, 2, 3))  # a pixel's shares of the features around it add up to 1
                scores[images] += of_s.sum((1, 2))
            of_negatives[images] = _resized_gradient(of_tall, height, -1)
            of_scores[images] = _resized_gradient(of_tall_scores, height, -1)
    return (negatives, scores, own, entropies), [of_negatives, of_scores, of_entropies]


def gradient(
    labels: Tensor, kept: list[Tensor], count: int, ce: bool, shape: tuple[int, ...],
    of_negatives: Tensor, of_scores: Tensor, of_own: Tensor, of_entropies: Tensor,
) -> Tensor:  # fmt: skip
    """(B, h, w, N), the gradient of the logits from those of the reductions."""
    negatives, scores, entropies = kept
    if ce:
        found = entropies[..., :-1] * of_entropies[:, None, None, None]
        of_own = of_own - torch.where(labels != UNLABELLED, of_entropies[:, None, None], 0.0)
    else:
        found = of_own.new_zeros(shape)
    if count:
        first = found[..., :count]
        first.addcmul_(negatives, of_negatives[:, None, None, None])
        first.addcmul_(scores, of_scores[:, None, None])
    return _add_own(found.contiguous(), labels, of_own)


def _add_own(found: Tensor, labels: Tensor, of_own: Tensor) -> Tensor:
    """Adds the gradient (B, H, W) of each pixel's own logit to the four features that it was interpolated from."""
    _, height, width, channels = found.shape
    flat, label = found.view(len(found), -1), labels.clamp(min=0)
    for row, of_row in _neighbours(height, labels.shape[1], found):
        for column, of_column in _neighbours(width, labels.shape[2], found):
            index = ((row[:, None] * width + column) * channels + label).flatten(1)
            flat.scatter_add_(1, index, (of_own * (of_row[:, None] * of_column)).flatten(1))
    return found


def _neighbours(cells: int, wanted: int, like: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The cells below and above each of `wanted` places, and each one's share: (wanted,) int64, (wanted,)."""
    place = (torch.arange(wanted, device=like.device, dtype=like.dtype) + 0.5) * (cells / wanted) - 0.5
    place = place.clamp(0, cells - 1)
    below = place.long()
    share = place - below
    return [(below, 1 - share), ((below + 1).clamp(max=cells - 1), share)]


def _resize(maps: Tensor, height: int, width: int) -> Tensor:
    """(b, h, w, N) -> (b, H, W, N); -1 leaves a side as it is."""
    size = [side if side > 0 else own for side, own in zip((height, width), maps.shape[1:3], strict=True)]
    return F.interpolate(maps.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)


def _resized_gradient(of_maps: Tensor, height: int, width: int) -> Tensor:
    """The transpose of `_resize`: gradients (b, H, W, N) -> (b, h, w, N); -1 leaves a side as it is."""
    batch, tall, wide, channels = of_maps.shape
    size = [batch, channels, height if height > 0 else tall, width if width > 0 else wide]
    first = of_maps.permute(0, 3, 1, 2)
    return torch.ops.aten.upsample_bilinear2d_backward(first, [tall, wide], size, False).permute(0, 2, 3, 1)


def _bands(logits: Tensor, labels: Tensor) -> list[tuple[slice, list[slice]]]:
    """Several whole images each, or one image in bands of rows."""
    most = CPU_BAND if logits.device.type == "cpu" else GPU_BAND
    batch, height, width = labels.shape
    row = logits.shape[3] * width
    images = max(1, most // (row * height))
    rows = max(1, most // row)
    bands = [slice(top, top + rows) for top in range(0, height, rows)] if images == 1 else [slice(0, height)]
    return [(slice(first, first + images), bands) for first in range(0, batch, images)]
