"""The test protocol up to the logits: short side resized, whole image or sliding windows, averaged where they overlap.

The logits keep the resized image's size; what follows is in pipeline/metrics.py.
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.data.views import normalise

# Normalised pixels (1, 3, h, w) -> features (1, C, ceil(h / stride), ceil(w / stride)).
Encoder = Callable[[Tensor], Tensor]
LONGEST = 8  # times the short side


def short_side_to(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 with its short side at `size` pixels, ratio kept; bilinear.

    Of strips longer than 8 : 1 the long side is 8 x `size`: a few pixels by a few thousand would fill the memory.
    """
    height, width = image.shape[:2]
    scale = min(size / min(height, width), LONGEST * size / max(height, width))
    columns, rows = (max(int(side * scale + 0.5), 1) for side in (width, height))  # halves go up, as in mmsegmentation
    return np.asarray(Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR))


def windows(length: int, side: int, stride: int) -> list[tuple[int, int]]:
    """First pixel and the one after the last of each window along one side; the last window ends at the border."""
    count = max(-(-(length - side) // stride), 0) + 1
    ends = [min(index * stride + side, length) for index in range(count)]
    return [(max(end - side, 0), end) for end in ends]


@torch.inference_mode()
def class_logits(
    image: np.ndarray,
    encode: Encoder,
    stride: int,
    text_features: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Tensor:
    """Inference of section 3.4 on one window: (h, w, 3) uint8 and (K, C) text -> logits R . T, (K, h, w).

    The product is linear, so that upsampling the logits equals upsampling R.
    """
    features = encode(normalise(image[None], mean, std).to(text_features.device))
    logits = torch.einsum("bchw,kc->bkhw", features, text_features)
    height, width = image.shape[:2]
    return nn.functional.interpolate(logits, scale_factor=stride, mode="bilinear")[0, :, :height, :width]


@torch.inference_mode()
def slide(image: np.ndarray, predict: Callable[[np.ndarray], Tensor], side: int, stride: int) -> Tensor:
    """Logits (K, h, w) of (h, w, 3): those of windows of `side` pixels every `stride`, averaged where they overlap."""
    height, width = image.shape[:2]
    boxes = [(*rows, *columns) for rows in windows(height, side, stride) for columns in windows(width, side, stride)]
    total, count = None, torch.zeros(height, width)
    for top, bottom, left, right in boxes:
        logits = predict(image[top:bottom, left:right])
        total = logits.new_zeros(len(logits), height, width) if total is None else total
        total[:, top:bottom, left:right] += logits
        count[top:bottom, left:right] += 1
    assert total is not None  # there is at least one window
    return total.div_(count.to(total.device))
