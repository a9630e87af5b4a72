"""The test protocol up to the logits: short side resized, whole image or sliding windows, averaged where they overlap.

What follows is in pipeline/metrics.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from configs.errors import UserError
from pipeline.data.views import normalise

# Normalised pixels (B, 3, h, w) -> logits R . T (B, K, ceil(h / stride), ceil(w / stride)).
Classifier = Callable[[Tensor], Tensor]
LONGEST = 8  # times the short side


def short_side_to(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 with its short side at `size` pixels, ratio kept; bilinear.

    For aspect ratios above 8 : 1, the long side is limited to 8 x `size`, as extreme strips would fill the memory.
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


@dataclass(frozen=True)
class Window:
    """Logits (K, ceil(h / stride), ceil(w / stride)) for the pixels top:bottom, left:right of an image."""

    box: tuple[int, int, int, int]  # top, bottom, left, right
    logits: Tensor


@dataclass(frozen=True)
class ClassLogits:
    """The logits R . T of an image, kept at the stride of R because all classes at full size would fill the memory.

    Attributes:
        size: (H, W) of the image.
        stride: pixels per logit along one side.
        windows: together they cover the image.
        class_of_channel: the class of each of the K logits, ascending; None where each is a class.
    """

    size: tuple[int, int]
    stride: int
    windows: tuple[Window, ...]
    class_of_channel: Sequence[int] | None = None

    def channels_of(self, classes: list[int]) -> list[tuple[int, int]]:
        """(channel, class) of each channel of these classes."""
        if self.class_of_channel is None:
            return [(index, index) for index in classes]
        wanted = set(classes)
        return [(channel, index) for channel, index in enumerate(self.class_of_channel) if index in wanted]

    @torch.inference_mode()
    def upsampled(self, channels: list[int]) -> Tensor:
        """(k, H, W) logits of these channels, bilinear; averaged where windows overlap."""
        if len(self.windows) == 1:
            return self._full_size(self.windows[0], channels)
        total = self.windows[0].logits.new_zeros(len(channels), *self.size)
        count = total.new_zeros(self.size)
        for window in self.windows:
            top, bottom, left, right = window.box
            total[:, top:bottom, left:right] += self._full_size(window, channels)
            count[top:bottom, left:right] += 1
        return total.div_(count)

    def _full_size(self, window: Window, channels: list[int]) -> Tensor:
        top, bottom, left, right = window.box
        logits = window.logits[channels][None]
        full = (
            nn.functional.interpolate(logits, scale_factor=self.stride, mode="bilinear") if self.stride > 1 else logits
        )
        return full[0, :, : bottom - top, : right - left]


@dataclass(frozen=True)
class Cut:
    """An image and the windows in which a model is shown it.

    Attributes:
        image: (H, W, 3) uint8.
        boxes: top, bottom, left, right of each window; they have one size and together cover the image.
    """

    image: np.ndarray
    boxes: list[tuple[int, int, int, int]]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.image.shape[0], self.image.shape[1]

    @property
    def window(self) -> tuple[int, int]:
        """(h, w) of a window."""
        top, bottom, left, right = self.boxes[0]
        return bottom - top, right - left

    def windows(self) -> list[np.ndarray]:
        """(h, w, 3) uint8 each."""
        return [self.image[top:bottom, left:right] for top, bottom, left, right in self.boxes]


@torch.inference_mode()
def class_logits(
    cuts: Sequence[Cut],
    classify: Classifier,
    stride: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: str = "cpu",
    at_once: int = 1,
    class_of_channel: Sequence[int] | None = None,
) -> list[ClassLogits]:
    """Inference of section 3.4 on images whose windows have one size, `at_once` windows in a pass on `device`.

    R . T is linear, so that upsampling it equals upsampling R.

    Raises:
        UserError: a logit is NaN or infinite: no class could be told.
    """
    windows, found = [window for image in cuts for window in image.windows()], list[Tensor]()
    for start in range(0, len(windows), at_once):
        logits = classify(normalise(np.stack(windows[start : start + at_once]), mean, std, device))
        if not logits.isfinite().all():
            raise UserError("the model gives logits that are not finite: train again by a lower train.lr, or in fp32")
        found += logits
    each = iter(found)
    return [
        ClassLogits(image.size, stride, tuple(Window(box, next(each)) for box in image.boxes), class_of_channel)
        for image in cuts
    ]


def whole(height: int, width: int) -> list[tuple[int, int, int, int]]:
    """One window."""
    return [(0, height, 0, width)]


def sliding(height: int, width: int, side: int, stride: int) -> list[tuple[int, int, int, int]]:
    """Windows of `side` pixels every `stride`."""
    return [(*rows, *columns) for rows in windows(height, side, stride) for columns in windows(width, side, stride)]
