"""Views: recorded geometries of an image, drawn once in stage one and replayed in stage two.

A view is the box it shows, as fractions of the image, and whether it is flipped; its output is square, and padded where
the box leaves the image. What is cached belongs to one view and is never flipped or cropped afterwards: the teacher's
grid of a flipped image is not the flipped grid.
"""

import hashlib
import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from configs.schema import Views
from pipeline.data.dataset import IGNORE
from pipeline.transfer import sent

# An array (5,) float32: left, top, right, bottom as fractions, right and bottom perhaps beyond 1; flip as 0 or 1.
View = np.ndarray

MAX_CLASS_SHARE, TRIES = 0.75, 10  # the "75 % rule"
LONG_TO_SHORT = 4  # mmsegmentation's scale (2048, 512): a longer image is shrunk until its long side fits


def draw_views(config: Views, image_id: str, seen: np.ndarray, numbers: Sequence[int] | None = None) -> np.ndarray:
    """(V, 5) float32 views of one image; they depend only on the settings, the image's id and its seen mask (H, W).

    Each view has its own seed, derived from (seed, id, number of the view), so adding views does not change the first
    ones. `numbers` selects views; by default the `config.count` recorded ones.

    `whole`: the image, once. `random`: ZegCLIP's training pipeline. The short side is brought to `size` x a ratio drawn
    from `ratio`; a crop of side `size` is drawn up to 10 times, until it shows two classes or more of which none takes
    75 % of its labelled pixels; it is flipped half the time. Images smaller than the crop are padded right and below.
    """
    numbers = range(config.count) if numbers is None else numbers
    if config.crop == "whole":
        return np.array([[0, 0, 1, 1, 0]] * len(numbers), np.float32)
    digest = hashlib.sha256(os.fsencode(image_id)).digest()
    seed = [config.seed, int.from_bytes(digest[:8], "little")]
    return np.stack([_draw_crop(config, np.random.default_rng([*seed, view]), seen) for view in numbers])


def _draw_crop(config: Views, rng: np.random.Generator, seen: np.ndarray) -> View:
    size, sides = config.size, np.array(seen.shape[::-1])  # width, height
    scale = rng.uniform(*config.ratio) * size * min(1 / sides.min(), LONG_TO_SHORT / sides.max())
    resized = np.maximum(np.rint(sides * scale), 1)
    flip = rng.random() < 0.5
    for _ in range(TRIES):
        corner = rng.integers(0, np.maximum(resized - size, 0) + 1)
        view = np.array([*corner / resized, *(corner + size) / resized, flip], np.float32)
        shown = replay(view, seen, size)
        counts = np.bincount(shown[shown != IGNORE])
        if np.count_nonzero(counts) > 1 and counts.max() < MAX_CLASS_SHARE * counts.sum():
            break
    return view


def _extent(view: View, size: int) -> tuple[int, int]:
    """Columns and rows of the output that show the image; the rest is padding."""
    first, last = view[:2].astype(float), view[2:4].astype(float)
    share = np.minimum((1 - first) / (last - first), 1)
    columns, rows = np.maximum(np.rint(size * share), 1).astype(int).tolist()
    return columns, rows


def replay(view: View, picture: np.ndarray, size: int, fill: int | tuple[int, ...] = IGNORE) -> np.ndarray:
    """The view of a uint8 image (H, W, 3) or mask (H, W) at `size` x `size`; bilinear for images, nearest for masks.

    `fill` is the value of padding: one number, or one per channel.
    """
    method = Image.Resampling.BILINEAR if picture.ndim == 3 else Image.Resampling.NEAREST
    height, width = picture.shape[:2]
    left, top, right, bottom = (float(value) for value in view[:4])
    box = left * width, top * height, min(right, 1.0) * width, min(bottom, 1.0) * height
    columns, rows = _extent(view, size)
    resized = Image.fromarray(picture).resize((columns, rows), method, box=box)
    shown = np.array(resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view[4] else resized)
    if (columns, rows) == (size, size):
        return shown
    canvas = np.empty((size, size, *picture.shape[2:]), np.uint8)
    canvas[:] = fill
    canvas[:rows, :columns] = shown
    return canvas


def inside(view: View, size: int) -> np.ndarray:
    """(S, S) bool: the output pixels that show the image and not padding."""
    columns, rows = _extent(view, size)
    shown = np.zeros((size, size), bool)
    shown[:rows, :columns] = True
    return shown


def padding_colour(mean: tuple[float, ...]) -> tuple[int, ...]:
    """The colour that normalisation turns into about 0."""
    return tuple(round(255 * value) for value in mean)


def normalise(
    images: np.ndarray | torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...], device: str = "cpu"
) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 on `device`, (x / 255 - mean) / std, its memory channels last."""
    pixels = torch.from_numpy(images.copy()) if isinstance(images, np.ndarray) else images
    pixels = sent(pixels, device).permute(0, 3, 1, 2).float() / 255  # sent as bytes, a quarter of the floats
    mean_, std_ = (sent(torch.tensor(values), device).view(3, 1, 1) for values in (mean, std))
    return (pixels - mean_) / std_


def unannotated_tokens(mask: np.ndarray, shown: np.ndarray, grid: int) -> np.ndarray:
    """(G, G) bool: over half of the token's pixels are ignored ones of the image.

    `mask` (S, S) uint8 and `shown` (S, S) bool, False for padding; S is a multiple of G.
    """
    height, width = mask.shape
    blocks = ((mask == IGNORE) & shown).reshape(grid, height // grid, grid, width // grid)
    return np.asarray(blocks.mean(axis=(1, 3)) > 0.5)


def teacher_view(
    view: View, image: np.ndarray, seen: np.ndarray, size: int, padding: tuple[int, ...], grid: int
) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's input for a view, (S, S, 3) uint8, and its unannotated tokens, (G, G) bool.

    `padding` is the `padding_colour` of the teacher's mean, `grid` its G at this size.
    """
    shown = replay(view, image, size, padding)
    return shown, unannotated_tokens(replay(view, seen, size), inside(view, size), grid)


def majority_tokens(mask: np.ndarray, grid: int) -> np.ndarray:
    """(S, S) uint8 mask -> (G, G) uint8: the most common class of each token, IGNORE if no pixel has a class."""
    height, width = mask.shape
    blocks = mask.reshape(grid, height // grid, grid, width // grid).transpose(0, 2, 1, 3).reshape(grid * grid, -1)
    counts = np.stack([np.bincount(block, minlength=256) for block in blocks])
    counts[:, IGNORE] = 0
    majority = np.where(counts.any(axis=1), counts.argmax(axis=1), IGNORE)
    return majority.reshape(grid, grid).astype(np.uint8)
