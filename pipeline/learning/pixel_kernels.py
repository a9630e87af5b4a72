"""The reductions of pixel_loss.py by two Triton kernels, which keep the upsampled logits in registers.

With E = B h w N logits at the features' size and P = B H W pixels, 4 bytes each, the kernels must move

- `_reduce`: read E logits and P labels (8 bytes); write P own logits, P log-sums and, of every COLUMNS pixels,
  count + 2 partial sums. The logits of a pixel's four features are read where they are needed, H / h times as often as
  E counts by rows of pixels, from the caches.
- `_gather`: read E logits, P labels, P log-sums, P gradients; write E gradients. Each feature collects the gradients of
  the pixels around it, so that no two programs write to one place and sums have one order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.learning import pixel_bands
from pipeline.learning.pixel_bands import Found

COLUMNS, CHANNELS = 16, 64  # of a program's tile
FAR = tl.constexpr(1e30)  # a log-sum that leaves no probability
ALPHA = tl.constexpr(pixel_bands.ALPHA)


@triton.jit
def _cells(place, cells, ratio):  # type: ignore[no-untyped-def]
    """The cells below and above a place, and the share of the one above."""
    at = tl.maximum((place + 0.5) * ratio - 0.5, 0.0)
    below = tl.minimum(at.to(tl.int32), cells - 1)
    return below, tl.minimum(below + 1, cells - 1), at - below


@triton.jit
def _sigmoids(x):  # type: ignore[no-untyped-def]
    """sigmoid(x), 1 - sigmoid(x) and softplus(x), each exact where it is small."""
    e = tl.exp(-tl.abs(x))
    whole = 1.0 + e
    log1p = tl.where(whole == 1.0, e, tl.log(whole) * (e / tl.where(whole == 1.0, 1.0, whole - 1.0)))
    high, low = 1.0 / whole, e / whole
    return tl.where(x >= 0, high, low), tl.where(x >= 0, low, high), tl.maximum(x, 0.0) + log1p


@triton.jit  # type: ignore[untyped-decorator]
def _reduce(  # type: ignore[no-untyped-def]
    logits, labels, own, log_sums, focal, scores, entropies, h, w, n, height, width, count, y_ratio, x_ratio,
    CE: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS pixels of a row, all channels."""
    blocks = tl.cdiv(width, COLUMNS)
    program = tl.program_id(0)
    image, y, x = program // (height * blocks), program // blocks % height, program % blocks * COLUMNS
    x += tl.arange(0, COLUMNS)
    inside = x < width
    pixel = (image.to(tl.int64) * height + y) * width + x
    label = tl.load(labels + pixel, inside, -1).to(tl.int32)
    top, bottom, down = _cells(y, h, y_ratio)
    left, right, across = _cells(x, w, x_ratio)
    start = logits + image.to(tl.int64) * h * w * n
    largest, total = tl.full((COLUMNS,), -FAR, tl.float32), tl.zeros((COLUMNS,), tl.float32)
    of_label, loss = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, n if CE else count, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        there = inside[:, None] & (channel < n)[None, :]
        a = tl.load(start + (top * w + left)[:, None] * n + channel[None, :], there, 0.0)
        b = tl.load(start + (top * w + right)[:, None] * n + channel[None, :], there, 0.0)
        c = tl.load(start + (bottom * w + left)[:, None] * n + channel[None, :], there, 0.0)
        d = tl.load(start + (bottom * w + right)[:, None] * n + channel[None, :], there, 0.0)
        a, b = a + (c - a) * down, b + (d - b) * down
        v = a + (b - a) * across[:, None]
        of_label += tl.sum(tl.where(channel[None, :] == label[:, None], v, 0.0), 1)
        if CE:
            bounded = tl.where((channel < n)[None, :], v, -FAR)
            higher = tl.maximum(largest, tl.max(bounded, 1))
            total = total * tl.exp(largest - higher) + tl.sum(tl.exp(bounded - higher[:, None]), 1)
            largest = higher
        if first < count:
            s, rest, softplus = _sigmoids(v)
            wanted = there & (channel < count)[None, :]
            negative, positive = (1 - ALPHA) * s * s * softplus, ALPHA * rest * rest * (softplus - v)
            each = tl.where(channel[None, :] == label[:, None], positive, negative)
            loss += tl.sum(tl.where(wanted, each, 0.0), 1)
            sums = tl.sum(tl.where(wanted, s, 0.0), 0)
            tl.store(scores + program.to(tl.int64) * count + channel, sums, channel < count)
    tl.store(own + pixel, of_label, inside)
    tl.store(focal + program, tl.sum(loss, 0))
    if CE:
        log_sum = largest + tl.log(total)
        tl.store(log_sums + pixel, log_sum, inside)
        tl.store(entropies + program, tl.sum(tl.where(label >= 0, log_sum - of_label, 0.0), 0))


@triton.jit  # type: ignore[untyped-decorator]
def _gather(  # type: ignore[no-untyped-def]
    logits, labels, log_sums, of_focal, of_scores, of_own, of_entropies, found,
    h, w, n, height, width, count, y_ratio, x_ratio,
    CE: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: CHANNELS channels of COLUMNS features of a row; at most ROWS x SPAN pixels have a part in one."""
    blocks = tl.cdiv(w, COLUMNS)
    program = tl.program_id(0)
    image, i, j = program // (h * blocks), program // blocks % h, program % blocks * COLUMNS
    j += tl.arange(0, COLUMNS)
    inside = j < w
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    there = inside[:, None] & (channel < n)[None, :]
    start = logits + image.to(tl.int64) * h * w * n
    before, after = tl.maximum(j - 1, 0), tl.minimum(j + 1, w - 1)
    of_loss, of_entropy = tl.load(of_focal), tl.load(of_entropies)
    of_score = tl.load(of_scores + image * count + channel, channel < count, 0.0)
    # The first pixels that lie beyond the centre of the cell before; one earlier, in case of rounding.
    y_first = tl.floor((i - 0.5) / y_ratio - 0.5).to(tl.int32)
    x_first = tl.floor((j - 0.5) / x_ratio - 0.5).to(tl.int32)
    sums = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    for row in range(ROWS):
        y = y_first + row
        top, bottom, down = _cells(y, h, y_ratio)
        share = tl.where(top == i, 1.0 - down, 0.0) + tl.where(bottom == i, down, 0.0)
        if (y >= 0) & (y < height) & (share > 0):
            a = tl.load(start + (top * w + before)[:, None] * n + channel[None, :], there, 0.0)
            b = tl.load(start + (top * w + j)[:, None] * n + channel[None, :], there, 0.0)
            c = tl.load(start + (top * w + after)[:, None] * n + channel[None, :], there, 0.0)
            a += (tl.load(start + (bottom * w + before)[:, None] * n + channel[None, :], there, 0.0) - a) * down
            b += (tl.load(start + (bottom * w + j)[:, None] * n + channel[None, :], there, 0.0) - b) * down
            c += (tl.load(start + (bottom * w + after)[:, None] * n + channel[None, :], there, 0.0) - c) * down
            for column in range(SPAN):
                x = x_first + column
                left, right, across = _cells(x, w, x_ratio)
                part = tl.where(left == j, 1.0 - across, 0.0) + tl.where(right == j, across, 0.0)
                used = inside & (x >= 0) & (x < width) & (part > 0)
                pixel = (image.to(tl.int64) * height + y) * width + x
                label = tl.load(labels + pixel, used, -1).to(tl.int32)
                v = tl.where((left == j)[:, None], b + (c - b) * across[:, None], a + (b - a) * across[:, None])
                s, rest, softplus = _sigmoids(v)
                negative = (1 - ALPHA) * s * s * (s + 2 * rest * softplus)
                positive = -ALPHA * rest * rest * (rest + 2 * s * (softplus - v))
                own = channel[None, :] == label[:, None]
                g = of_loss * tl.where(own, positive, negative) + of_score[None, :] * s * rest
                g = tl.where((channel < count)[None, :], g, 0.0)
                of_label = tl.load(of_own + pixel, used, 0.0)
                if CE:
                    log_sum = tl.load(log_sums + pixel, used & (label >= 0), FAR)
                    g += of_entropy * tl.exp(v - log_sum[:, None])
                    of_label -= of_entropy
                g += tl.where(own, of_label[:, None], 0.0)
                sums += tl.where(used, share * part, 0.0)[:, None] * g
    tl.store(found + ((image.to(tl.int64) * h + i) * w + j)[:, None] * n + channel[None, :], sums, there)


def reductions(logits: Tensor, labels: Tensor, count: int, ce: bool) -> tuple[Found, list[Tensor]]:
    """As pixel_bands.reductions, of float32."""
    batch, h, w, n = logits.shape
    height, width = labels.shape[1:]
    programs = height * math.ceil(width / COLUMNS)
    own, log_sums = (logits.new_empty(labels.shape) for _ in range(2))
    focal, scores, entropies = (logits.new_empty(batch, programs, *size) for size in ((), (count,), ()))
    labels = labels.contiguous()
    _reduce[(batch * programs,)](
        logits, labels, own, log_sums, focal, scores, entropies, h, w, n, height, width, count, h / height, w / width,
        CE=ce, COLUMNS=COLUMNS, CHANNELS=CHANNELS,
    )  # fmt: skip
    return (focal.sum(), scores.sum(1), own, entropies.sum() if ce else logits.new_zeros(())), [logits, log_sums]


def gradient(
    labels: Tensor, kept: list[Tensor], count: int, ce: bool, shape: tuple[int, ...],
    of_focal: Tensor, of_scores: Tensor, of_own: Tensor, of_entropies: Tensor,
) -> Tensor:  # fmt: skip
    """As pixel_bands.gradient."""
    logits, log_sums = kept
    batch, h, w, n = shape
    height, width = labels.shape[1:]
    found = torch.empty_like(logits)
    _gather[(batch * h * math.ceil(w / COLUMNS), math.ceil(n / CHANNELS))](
        logits, labels.contiguous(), log_sums, of_focal, of_scores.contiguous(), of_own.contiguous(), of_entropies,
        found, h, w, n, height, width, count, h / height, w / width,
        CE=ce, ROWS=_span(h, height), SPAN=_span(w, width), COLUMNS=COLUMNS, CHANNELS=CHANNELS,
    )  # fmt: skip
    return found


def _span(cells: int, pixels: int) -> int:
    """The most pixels that are interpolated from one cell, with one to spare at each end."""
    return math.ceil(2 * pixels / cells) + 3
