"""Layers in plain, slow NumPy (float64) for the references of this folder, and modules without convenient weights.

A layer gives its weights only; kernel placement, strides and formulas are written here.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.reference import Array, bilinear

Levels = list[Array]


def as_array(tensor: Any) -> Array:
    return np.asarray(tensor.detach().cpu().numpy(), dtype=np.float64)


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Every weight and statistic random: no zero bias, no unit norm, no layer scale hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        stored = module.state_dict()  # other buffers are constants
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not tensor.is_floating_point() or name not in stored:
                continue
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                drawn = drawn.abs() + 0.5
            elif tensor.ndim > 1:
                drawn = drawn / math.sqrt(fan_in)
            else:
                drawn = 1 + 0.3 * drawn if name.endswith("weight") else 0.3 * drawn
            tensor.copy_(drawn)


def convolve(x: Array, layer: Any, stride: int = 1, depthwise: bool = False) -> Array:
    """(B, C, H, W) -> (B, N, ceil(H / s), ceil(W / s)): zeros around, half a kernel on each side."""
    weight = as_array(layer.weight)
    _, _, rows, columns = weight.shape
    batch, _, height, width = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2)))
    out = np.zeros((batch, len(weight), -(-height // stride), -(-width // stride)))
    for i, j in np.ndindex(rows, columns):
        seen = padded[:, :, i : i + height : stride, j : j + width : stride]
        if depthwise:
            assert weight.shape[:2] == (x.shape[1], 1)
            out += seen * weight[:, 0, i, j][:, None, None]
        else:
            out += np.einsum("bchw,nc->bnhw", seen, weight[:, :, i, j])
    return out if layer.bias is None else out + as_array(layer.bias)[:, None, None]


def batch_norm(x: Array, layer: Any) -> Array:
    """With its running statistics."""
    scale = as_array(layer.weight) / np.sqrt(as_array(layer.running_var) + 1e-5)
    return (x - as_array(layer.running_mean)[:, None, None]) * scale[:, None, None] + as_array(layer.bias)[
        :, None, None
    ]


def group_norm(x: Array, layer: Any, groups: int = 32) -> Array:
    grouped = x.reshape(len(x), groups, -1)
    mean, variance = grouped.mean(axis=2, keepdims=True), grouped.var(axis=2, keepdims=True)
    return _affine(((grouped - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape), layer)


def layer_norm(x: Array, layer: Any, epsilon: float = 1e-5) -> Array:
    """Over the channels of (B, C, H, W)."""
    mean, variance = x.mean(axis=1, keepdims=True), x.var(axis=1, keepdims=True)
    return _affine((x - mean) / np.sqrt(variance + epsilon), layer)


def _affine(x: Array, layer: Any) -> Array:
    return x * as_array(layer.weight)[:, None, None] + as_array(layer.bias)[:, None, None]


def gelu(x: Array) -> Array:
    """X times the normal distribution's share below x."""
    return np.asarray(x * 0.5 * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2))))


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def conv_batch_relu(x: Array, layers: Any) -> Array:
    """Convolution, batch norm and ReLU of one nn.Sequential."""
    assert layers[0].bias is None
    return relu(batch_norm(convolve(x, layers[0]), layers[1]))


def resize(x: Array, size: tuple[int, int]) -> Array:
    return bilinear(x, size)


def average_pool(x: Array, cells: int) -> Array:
    """(B, C, H, W) -> (B, C, cells, cells): the mean of the pixels that a cell touches."""
    height, width = x.shape[2:]
    out = np.zeros((*x.shape[:2], cells, cells))
    for i, j in np.ndindex(cells, cells):
        rows = slice(i * height // cells, -(-(i + 1) * height // cells))
        columns = slice(j * width // cells, -(-(j + 1) * width // cells))
        out[:, :, i, j] = x[:, :, rows, columns].mean(axis=(2, 3))
    return out


def random_levels(sizes: list[tuple[int, int]], channels: list[int], seed: int = 0, batch: int = 2) -> Levels:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(batch, count, *size)) for count, size in zip(channels, sizes, strict=True)]


def as_tensors(levels: Levels) -> list[torch.Tensor]:
    return [torch.from_numpy(level.copy()) for level in levels]
