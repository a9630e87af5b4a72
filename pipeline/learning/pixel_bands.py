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
ALPHA = 0.25  # of ZegCLIP's focal loss, whose gamma is 2

Found = tuple[Tensor, Tensor, Tensor, Tensor]


def reductions(logits: Tensor, labels: Tensor, count: int, ce: bool) -> tuple[Found, list[Tensor]]:
    """What `pixel_loss.Reductions` returns, and what `gradient` needs: U' of the derivatives of each reduction.

    These are (B, h, w, count) of the focal loss, each logit a negative, up to a factor, and of scores, (B, h, w, N + 1)
    of log-sum-exp over labelled pixels, and (B, H, W) of what a pixel's own logit adds to the focal loss as a positive.
    """
    batch, height, _, channels = logits.shape
    focal, entropies, scores = logits.new_zeros(()), logits.new_zeros(()), logits.new_zeros(batch, count)
    own, zero = logits.new_zeros(labels.shape), logits.new_zeros(())
    of_focal, of_scores = (logits.new_empty(*logits.shape[:3], count) for _ in range(2))
    of_entropies = logits.new_empty(*logits.shape[:3], (channels + 1) * ce)
    high, wide = labels.shape[1:]
    for images, bands in _bands(logits, labels):
        before = high if len(bands) > 1 else height  # whole images are resized in both directions at once
        if ce:
            # A channel more, which takes all of an unlabelled pixel's probability: its gradient is zero without a mask.
            maps = _resize(F.pad(logits[images], (0, 1)), before, -1)
            of_maps = torch.empty_like(maps)
            for rows in bands:
                label = labels[images, rows]
                x = _resize(maps[:, rows], label.shape[1], wide)
                labelled = label != UNLABELLED
                x[..., -1] = torch.where(labelled, -SINK, SINK)
                log_p = x.log_softmax(3)
                own_log_p = log_p.gather(3, label.clamp(min=0)[..., None])[..., 0]
                entropies -= torch.where(labelled, own_log_p, 0.0).sum()
                _resized_gradient(log_p.exp_(), of_maps[:, rows])
            _resized_gradient(of_maps, of_entropies[images])
        if count:
            maps = _resize(logits[images][..., :count].contiguous(), before, -1)
            of_maps, of_maps_scores = torch.empty_like(maps), torch.empty_like(maps)
            for rows in bands:
                label = labels[images, rows]
                x = _resize(maps[:, rows], label.shape[1], wide)
                own[images, rows] = x.gather(3, label.clamp(0, count - 1)[..., None])[..., 0]
                # n = s^2 softplus(x); n' = s^3 + 2 s^2 (1 - s) softplus(x) = 2 (n + s (s^2 / 2 - n)); s' = s - s^2.
                s, n = x.sigmoid(), F.softplus(x)
                half = torch.addcmul(zero, s, s, value=0.5)
                torch.addcmul(zero, half, n, value=2, out=n)
                focal += n.sum()
                of_s, of_half = torch.empty_like(of_maps[:, rows]), torch.empty_like(of_maps[:, rows])
                _resized_gradient(s, of_s)
                _resized_gradient(half, of_half)
                scores[images] += of_s.sum((1, 2))  # a pixel's shares of the features around it add up to 1
                torch.sub(of_s, of_half, alpha=2, out=of_maps_scores[:, rows])
                _resized_gradient(n.lerp_(half, s), of_maps[:, rows])
            _resized_gradient(of_maps, of_focal[images])
            _resized_gradient(of_maps_scores, of_scores[images])
    of_corrections = own
    if count:
        corrections, of_corrections = _corrections(own, (labels >= 0) & (labels < count))
        focal = (1 - ALPHA) * focal + corrections
    return (focal, scores, own, entropies), [of_focal, of_scores, of_entropies, of_corrections]


def _corrections(x: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """What the pixels' own logits x add to the focal loss as positives, less what as negatives; and the derivative.

    (B, H, W) each -> (), (B, H, W).
    """
    s, softplus = x.sigmoid(), F.softplus(x)
    rest = 1 - s  # sigmoid(-x); softplus(-x) = softplus(x) - x
    of_positives, of_negatives = positive * ALPHA * rest * rest, positive * (1 - ALPHA) * s * s
    total = (of_positives * (softplus - x) - of_negatives * softplus).sum()
    return total, -of_positives * (2 * s * (softplus - x) + rest) - of_negatives * (2 * rest * softplus + s)


def gradient(
    labels: Tensor, kept: list[Tensor], count: int, ce: bool, shape: tuple[int, ...],
    of_focal: Tensor, of_scores: Tensor, of_own: Tensor, of_entropies: Tensor,
) -> Tensor:  # fmt: skip
    """(B, h, w, N), the gradient of the logits from those of the reductions."""
    focal, scores, entropies, corrections = kept
    if ce:
        found = entropies[..., :-1] * of_entropies
        of_own = of_own - torch.where(labels != UNLABELLED, of_entropies, 0.0)
    else:
        found = of_own.new_zeros(shape)
    if count:
        of_own = of_own + of_focal * corrections
        first = found[..., :count]
        first.addcmul_(focal, of_focal, value=2 * (1 - ALPHA))
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


def _resized_gradient(of_maps: Tensor, out: Tensor) -> None:
    """The transpose of `_resize`: gradients (b, H, W, N) -> `out` (b, h, w, N), which is overwritten."""
    first, into = of_maps.permute(0, 3, 1, 2), out.permute(0, 3, 1, 2)
    transpose = torch.ops.aten.upsample_bilinear2d_backward.grad_input
    transpose(first, of_maps.shape[1:3], into.shape, False, grad_input=into)


def _bands(logits: Tensor, labels: Tensor) -> list[tuple[slice, list[slice]]]:
    """Several whole images each, or one image in bands of rows; `slice(None)` is all rows."""
    most = CPU_BAND if logits.device.type == "cpu" else GPU_BAND
    batch, height, width = labels.shape
    rows = max(1, most // (logits.shape[3] * width))
    images = max(1, rows // height)
    bands = [slice(None)] if rows >= height else [slice(top, top + rows) for top in range(0, height, rows)]
    return [(slice(first, first + images), bands) for first in range(0, batch, images)]
