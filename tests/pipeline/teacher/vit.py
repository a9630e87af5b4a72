"""CLIP's ViT and ClearCLIP's last block in plain NumPy (float64), written from the papers to check the fast code.

B images, G x G tokens, W width of the tower, C of the embedding; parameters go by the names of open_clip's state dict.
"""

import math
from collections.abc import Mapping

import numpy as np

from tests.reference import Array

Parameters = Mapping[str, Array]
_erf = np.vectorize(math.erf)


def layer_norm(x: Array, p: Parameters, name: str) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return np.asarray(scaled * p[f"{name}.weight"] + p[f"{name}.bias"])


def linear(x: Array, p: Parameters, name: str) -> Array:
    return np.asarray(x @ p[f"{name}.weight"].T + p[f"{name}.bias"])


def attention(x: Array, p: Parameters, name: str, heads: int, match: str) -> Array:
    """(B, T, W) -> (B, T, W), head by head: softmax(q k^T / sqrt(d)) v, with q for k where `match` is "qq"."""
    width = x.shape[-1]
    size = width // heads
    weight, bias = p[f"{name}.in_proj_weight"], p[f"{name}.in_proj_bias"]
    q, k, v = (x @ weight[i * width : (i + 1) * width].T + bias[i * width : (i + 1) * width] for i in range(3))
    out = np.zeros_like(x)
    for b in range(len(x)):
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            other = q if match == "qq" else k
            scores = q[b, :, part] @ other[b, :, part].T / math.sqrt(size)
            shares = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[b, :, part] = shares / shares.sum(axis=1, keepdims=True) @ v[b, :, part]
    return linear(out, p, f"{name}.out_proj")


def block(x: Array, p: Parameters, name: str, heads: int) -> Array:
    """The unmodified pre-norm block: both residuals, GELU in the FFN."""
    x = x + attention(layer_norm(x, p, f"{name}.ln_1"), p, f"{name}.attn", heads, "qk")
    hidden = linear(layer_norm(x, p, f"{name}.ln_2"), p, f"{name}.mlp.c_fc")
    hidden = hidden * 0.5 * (1 + _erf(hidden / math.sqrt(2)))
    return x + linear(hidden, p, f"{name}.mlp.c_proj")


def encode(pixels: Array, p: Parameters, layers: int, heads: int) -> tuple[Array, Array]:
    """(B, 3, S, S) -> CLS tokens (B, C) of the unmodified tower, dense tokens (B, G, G, C) of ClearCLIP's."""
    kernel = p["visual.conv1.weight"]
    patch, grid, batch = kernel.shape[-1], pixels.shape[-1] // kernel.shape[-1], len(pixels)
    tokens = np.zeros((batch, 1 + grid * grid, len(kernel)))
    tokens[:, 0] = p["visual.class_embedding"]
    for y, x in np.ndindex(grid, grid):
        window = pixels[:, :, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
        tokens[:, 1 + y * grid + x] = window.reshape(batch, -1) @ kernel.reshape(len(kernel), -1).T
    tokens = layer_norm(tokens + p["visual.positional_embedding"], p, "visual.ln_pre")
    for layer in range(layers - 1):
        tokens = block(tokens, p, f"visual.transformer.resblocks.{layer}", heads)
    last = f"visual.transformer.resblocks.{layers - 1}"
    cls_token = layer_norm(block(tokens, p, last, heads)[:, 0], p, "visual.ln_post") @ p["visual.proj"]
    mixed = attention(layer_norm(tokens, p, f"{last}.ln_1"), p, f"{last}.attn", heads, "qq")
    dense = layer_norm(mixed[:, 1:], p, "visual.ln_post") @ p["visual.proj"]
    return cls_token, dense.reshape(batch, grid, grid, -1)
