"""Photometric distortion after mmsegmentation's PhotoMetricDistortion, with its default strengths."""

from typing import NamedTuple

import numpy as np

BRIGHTNESS, CONTRAST, SATURATION, HUE = 32.0, 0.5, 0.5, 0.1  # hue: 18 of OpenCV's 180, in turns of the circle

_ROWS = 32  # at once: what is computed of them stays in the processor's cache, and its memory with the process


class Distortion(NamedTuple):
    """The distortion of one image; the defaults change nothing."""

    added: float = 0.0  # to every value
    contrast: float = 1.0  # factor of every value
    contrast_last: bool = False  # contrast after saturation and hue, not before
    saturation: float = 1.0  # factor of HSV's S
    hue: float = 0.0  # added to HSV's H, in turns


def draw_distortion(rng: np.random.Generator) -> Distortion:
    """Draw each part independently with probability 0.5, uniform in its range; contrast first or last, 0.5 each."""
    use = rng.random(4) < 0.5
    middle, reach = np.array([0, 1, 1, 0]), np.array([BRIGHTNESS, CONTRAST, SATURATION, HUE])
    drawn = rng.uniform(middle - reach, middle + reach)
    added, contrast, saturation, hue = np.where(use, drawn, middle).tolist()
    return Distortion(added, contrast, bool(rng.random() < 0.5), saturation, hue)


def distort(image: np.ndarray, how: Distortion) -> np.ndarray:
    """Distort an (H, W, 3) uint8 RGB image. Values are clipped to 0..255 after every part."""
    first, last = (1.0, how.contrast) if how.contrast_last else (how.contrast, 1.0)
    values = np.arange(256)
    brighter = np.clip(np.clip(values + how.added, 0, 255) * first, 0, 255)
    image = np.take(brighter.astype(np.uint8), image)  # truncated, as mmsegmentation does
    if how.saturation != 1 or how.hue != 0:
        for start in range(0, len(image), _ROWS):
            rows = image[start : start + _ROWS]
            rows[:] = _saturation_and_hue(rows, how.saturation, how.hue)
    return image if last == 1 else np.take(np.clip(values * last, 0, 255).astype(np.uint8), image)


def _saturation_and_hue(image: np.ndarray, saturation: float, hue: float) -> np.ndarray:
    """S x `saturation`, at most 1, and H + `hue` turns in HSV. A tenth of the time of PIL's or torchvision's HSV.

    With V = max, the chroma C = V S = max - min and H in sixths of the circle, channel R, G, B is V - C f(H + n) for
    n = 5, 3, 1 and f(k) = clip(min(k mod 6, 4 - k mod 6), 0, 1): S scales C, and nothing goes through 8-bit HSV.
    """
    red, green, blue = (image[..., channel].astype(np.float32) for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    divisor = np.maximum(chroma, 1)  # grey has no hue: its chroma of 0 makes any right
    sixths = np.where(
        value == red,
        (green - blue) / divisor,
        np.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sixths += np.float32(6 * hue)
    chroma = np.minimum(chroma * np.float32(saturation), value)
    turned = np.empty_like(image)
    for channel, offset in enumerate((5, 3, 1)):
        k = sixths + np.float32(offset)
        k -= 6 * np.floor(k / 6)
        np.minimum(k, 4 - k, out=k)
        np.clip(k, 0, 1, out=k)
        turned[..., channel] = np.rint(value - k * chroma)
    return turned
