"""Random input for the tests of the pipeline."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.inference import ClassLogits, Window
from tests import reference
from tests.reference import NONE, Array

MASKS = ("none", "all", "one", "strips", "sparse", "half", "dense")


def draw(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Array:
    """Normal float64 numbers."""
    return scale * rng.normal(size=shape)


def draw_unit(rng: np.random.Generator, *shape: int, dtype: Any = np.float64) -> Array:
    """Random vectors of length 1 along the last axis."""
    return reference.unit(rng.normal(size=shape)).astype(dtype)


def draw_mask(kind: str, grid: int, rng: np.random.Generator) -> Array:
    """(G, G) bool of unannotated tokens; "strips" are the tokens that windows 7 and 3 step over on a 32 x 32 grid."""
    mask = np.zeros((grid, grid), bool)
    if kind == "one":
        mask[tuple(rng.integers(0, grid, 2))] = True
    elif kind == "strips":
        mask[7::8] = mask[:, 7::8] = True
    elif kind == "half":
        mask[: (grid + 1) // 2] = True
    elif kind != "none":
        mask = rng.random((grid, grid)) < {"all": 2.0, "sparse": 0.05, "dense": 0.8}[kind]
    return mask


def draw_scene(rng: np.random.Generator, grid: int, width: int, objects: int, noise: float) -> tuple[Array, Array]:
    """Float32 tokens (G, G, C), of any length, of rectangles on a ground, and which of them each token shows (G, G)."""
    owner = np.zeros((grid, grid), int)
    for i in range(1, objects):
        top, left = rng.integers(0, grid, 2)
        height, across = rng.integers(2, grid // 2 + 2, 2)
        owner[top : top + height, left : left + across] = i
    tokens = draw_unit(rng, objects, width)[owner] + draw(rng, grid, grid, width, scale=noise)
    return (tokens * rng.uniform(0.5, 20, (grid, grid, 1))).astype(np.float32), owner


def draw_classes(rng: np.random.Generator, shape: tuple[int, ...], none: float, classes: int) -> Array:
    """Uint8 classes or groups 0, 1, ...; a share `none` of them 255."""
    return np.where(rng.random(shape) < none, NONE, rng.integers(0, classes, shape)).astype(np.uint8)


def as_logits(logits: Array | Tensor) -> ClassLogits:
    """(K, H, W) logits of an image as they are: one window, one logit a pixel."""
    tensor = torch.as_tensor(logits)
    height, width = tensor.shape[1:]
    return ClassLogits((height, width), 1, (Window((0, height, 0, width), tensor),))
