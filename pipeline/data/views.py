"""Views: recorded geometries of an image, drawn once in stage one and replayed in stage two.

A view is the box it shows, as fractions of the image, and whether it is flipped; its output is square. What is cached
belongs to one view and is never flipped or cropped afterwards: the teacher's grid of a flipped image is not the
flipped grid.
"""

import hashlib

import numpy as np
import torch
from PIL import Image

from configs.schema import Views

# An array (5,) float32: left, top, right, bottom as fractions, flip as 0 or 1.
View = np.ndarray


def draw_views(config: Views, image_id: str) -> np.ndarray:
    """(V, 5) float32 views of one image, depending on nothing but the settings and the image's id.

    V = 1 is the whole image. Otherwise the views are random crops of side `min_scale`..1, each flipped half the time.
    """
    if config.count == 1:
        return np.array([[0, 0, 1, 1, 0]], np.float32)
    digest = hashlib.sha256(image_id.encode()).digest()
    rng = np.random.default_rng([config.seed, int.from_bytes(digest[:8], "little")])
    side = rng.uniform(config.min_scale, 1, config.count)
    left, top = rng.uniform(0, 1, (2, config.count)) * (1 - side)
    flip = rng.random(config.count) < 0.5
    return np.stack([left, top, left + side, top + side, flip], axis=1).astype(np.float32)


def _box(view: View, width: int, height: int) -> tuple[float, float, float, float]:
    left, top, right, bottom = (float(value) for value in view[:4])
    return left * width, top * height, right * width, bottom * height


def replay(view: View, picture: np.ndarray, size: int) -> np.ndarray:
    """The view of a uint8 image (H, W, 3) or mask (H, W) at `size` x `size`; bilinear for images, nearest for masks."""
    method = Image.Resampling.BILINEAR if picture.ndim == 3 else Image.Resampling.NEAREST
    height, width = picture.shape[:2]
    shown = Image.fromarray(picture).resize((size, size), method, box=_box(view, width, height))
    array = np.asarray(shown)
    return np.ascontiguousarray(array[:, ::-1]) if view[4] else array


def normalise(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32, (x / 255 - mean) / std."""
    pixels = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def unannotated_tokens(mask: np.ndarray, grid: int, ignore: int = 255) -> np.ndarray:
    """(H, W) mask -> (G, G) bool: over half of the token's pixels are ignored. H and W are multiples of G."""
    height, width = mask.shape
    blocks = (mask == ignore).reshape(grid, height // grid, grid, width // grid)
    return np.asarray(blocks.mean(axis=(1, 3)) > 0.5)


def majority_tokens(mask: np.ndarray, grid: int, ignore: int = 255) -> np.ndarray:
    """(H, W) uint8 mask -> (G, G) uint8: the commonest class of each token, `ignore` where no pixel has one."""
    height, width = mask.shape
    blocks = mask.reshape(grid, height // grid, grid, width // grid).transpose(0, 2, 1, 3).reshape(grid * grid, -1)
    counts = np.stack([np.bincount(block, minlength=256) for block in blocks])
    counts[:, ignore] = 0
    majority = np.where(counts.any(axis=1), counts.argmax(axis=1), ignore)
    return majority.reshape(grid, grid).astype(np.uint8)
