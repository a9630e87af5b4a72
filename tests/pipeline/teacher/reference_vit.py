"""An independent reference for the teacher's tokens: Hugging Face's CLIP vision tower, in float64.

The blocks before the last one are `transformers`' own, with open_clip's weights under `transformers`' names. The last
block is written from the papers' formulas, head by head and row by row, in NumPy: slow and obvious. Nothing here is
shared with the product, and nothing is open_clip's but the names of its weights.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

Array = NDArray[np.float64]
Weights = dict[str, Tensor]
VARIANTS = ("plain", "maskclip", "sclip", "clearclip", "naclip")
NACLIP_STD = 5.0


def translate(weights: Weights, layers: int) -> Weights:
    """open_clip's image tower, under the names of `CLIPVisionModelWithProjection`."""
    tower = "vision_model."
    found = {
        "visual_projection.weight": weights["visual.proj"].T,
        tower + "embeddings.class_embedding": weights["visual.class_embedding"],
        tower + "embeddings.patch_embedding.weight": weights["visual.conv1.weight"],
        tower + "embeddings.position_embedding.weight": weights["visual.positional_embedding"],
    }
    for kind in ("weight", "bias"):
        found[f"{tower}pre_layrnorm.{kind}"] = weights[f"visual.ln_pre.{kind}"]
        found[f"{tower}post_layernorm.{kind}"] = weights[f"visual.ln_post.{kind}"]
        for index in range(layers):
            theirs, ours = f"visual.transformer.resblocks.{index}.", f"{tower}encoder.layers.{index}."
            found[f"{ours}layer_norm1.{kind}"] = weights[f"{theirs}ln_1.{kind}"]
            found[f"{ours}layer_norm2.{kind}"] = weights[f"{theirs}ln_2.{kind}"]
            found[f"{ours}mlp.fc1.{kind}"] = weights[f"{theirs}mlp.c_fc.{kind}"]
            found[f"{ours}mlp.fc2.{kind}"] = weights[f"{theirs}mlp.c_proj.{kind}"]
            found[f"{ours}self_attn.out_proj.{kind}"] = weights[f"{theirs}attn.out_proj.{kind}"]
            joined = weights[f"{theirs}attn.in_proj_{kind}"]
            side = len(joined) // 3
            for place, letter in enumerate("qkv"):
                found[f"{ours}self_attn.{letter}_proj.{kind}"] = joined[place * side : (place + 1) * side]
    return found


def resize_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """(1 + side * side, width) to (1 + rows * columns, width): bicubic, antialiased; the CLS token's row is kept."""
    side = round((len(table) - 1) ** 0.5)
    if (rows, columns) == (side, side):
        return table
    square = table[1:].T.reshape(1, -1, side, side)
    resized = torch.nn.functional.interpolate(
        square, (rows, columns), mode="bicubic", antialias=True, align_corners=False
    )
    return torch.cat([table[:1], resized[0].flatten(1).T])


def softmax(row: Array) -> Array:
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def layer_norm(x: Array, weight: Array, bias: Array) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * weight + bias


def quick_gelu(x: Array) -> Array:
    return x / (1 + np.exp(-1.702 * x))


def gelu(x: Array) -> Array:
    return x * 0.5 * (1 + torch.special.erf(torch.from_numpy(x) / 2**0.5).numpy())


def naclip_omega(rows: int, columns: int) -> Array:
    """What NACLIP adds to its logits: a bump about each patch, nothing to or from the CLS token."""
    places = [(row, column) for row in range(rows) for column in range(columns)]
    omega = np.zeros((1 + len(places), 1 + len(places)))
    for i, (row, column) in enumerate(places, 1):
        for j, (other_row, other_column) in enumerate(places, 1):
            distance2 = (row - other_row) ** 2 + (column - other_column) ** 2
            omega[i, j] = np.exp(-distance2 / (2 * NACLIP_STD**2))
    return omega


def attend(queries: Array, keys: Array, values: Array, added: Array | None = None) -> Array:
    """One head: softmax(queries keys^T / sqrt(head dim) + added) values, a row at a time."""
    out = np.empty_like(values)
    for i, query in enumerate(queries):
        logits = keys @ query / np.sqrt(len(query))
        out[i] = softmax(logits if added is None else logits + added[i]) @ values
    return out


class ReferenceVit:
    """Built from an open_clip architecture and its weights, of which the image tower is used."""

    def __init__(self, architecture: dict[str, Any], weights: Weights):
        vision = architecture["vision_cfg"]
        self.patch, self.layers = vision["patch_size"], vision["layers"]
        self.heads = vision["width"] // vision.get("head_width", 64)
        self.activation = quick_gelu if architecture.get("quick_gelu") else gelu
        config = CLIPVisionConfig(
            hidden_size=vision["width"],
            intermediate_size=4 * vision["width"],
            projection_dim=architecture["embed_dim"],
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            image_size=vision["image_size"],
            patch_size=self.patch,
            hidden_act="quick_gelu" if architecture.get("quick_gelu") else "gelu",
            layer_norm_eps=1e-5,
            attn_implementation="sdpa",  # all of it in float64; the softmax of "eager" is always in float32
        )
        self.model = CLIPVisionModelWithProjection(config).double().eval().requires_grad_(False)
        self.model.load_state_dict(
            {name: value.double() for name, value in translate(weights, self.layers).items()}, strict=True
        )
        self.weights = {
            name.removeprefix("vision_model."): value.numpy() for name, value in self.model.state_dict().items()
        }

    def image_embeds(self, pixels: Tensor) -> Array:
        """`transformers`' own forward, at the size that the model was made for."""
        return self.model(pixel_values=pixels.double()).image_embeds.numpy()

    def embed(self, pixels: Tensor) -> Tensor:
        """(B, 1 + patches, width): what enters the first block, at any size."""
        tower = self.model.vision_model
        patches = tower.embeddings.patch_embedding(pixels.double())
        positions = resize_positions(tower.embeddings.position_embedding.weight, *patches.shape[2:])
        first = tower.embeddings.class_embedding.expand(len(pixels), 1, -1)
        return tower.pre_layrnorm(torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1) + positions)

    def encode(self, pixels: Tensor) -> tuple[Array, dict[str, Array]]:
        """S, and D of each variant."""
        rows, columns = (side // self.patch for side in pixels.shape[2:])
        x = self.embed(pixels)
        *before, last = self.model.vision_model.encoder.layers
        for layer in before:
            x = layer(x, None)
        pooled = self.project(last(x, None)[:, 0].numpy())
        dense = {
            variant: np.stack([self.project(self.last_block(image, variant, rows, columns)) for image in x.numpy()])
            for variant in VARIANTS
        }
        return pooled, {name: value[:, 1:].reshape(len(x), rows, columns, -1) for name, value in dense.items()}

    def last_block(self, x: Array, variant: str, rows: int, columns: int) -> Array:
        """One image: (1 + patches, width), the CLS token first; so is what is returned."""
        h = self.norm(x, "layer_norm1")
        q, k, v = (self.linear(h, f"self_attn.{letter}_proj") for letter in "qkv")
        omega = naclip_omega(rows, columns) if variant == "naclip" else None
        size = x.shape[1] // self.heads
        mixed = np.empty_like(x)
        for head in range(self.heads):
            part = slice(head * size, (head + 1) * size)
            queries, keys, values = q[:, part], k[:, part], v[:, part]
            if variant == "plain":
                mixed[:, part] = attend(queries, keys, values)
            elif variant == "maskclip":
                mixed[:, part] = values
            elif variant == "sclip":
                mixed[:, part] = attend(queries, queries, values) + attend(keys, keys, values)
            elif variant == "clearclip":
                mixed[:, part] = attend(queries, queries, values)
            else:
                mixed[:, part] = attend(keys, keys, values, omega)
        y = self.linear(mixed, "self_attn.out_proj")
        if variant in ("clearclip", "naclip"):
            return y
        y = x + y
        return y + self.linear(self.activation(self.linear(self.norm(y, "layer_norm2"), "mlp.fc1")), "mlp.fc2")

    def project(self, x: Array) -> Array:
        """The final norm, and into the space that image and text share."""
        normed = layer_norm(x, self.weights["post_layernorm.weight"], self.weights["post_layernorm.bias"])
        return normed @ self.weights["visual_projection.weight"].T

    def linear(self, x: Array, name: str) -> Array:
        return x @ self.of_last(name + ".weight").T + self.of_last(name + ".bias")

    def norm(self, x: Array, name: str) -> Array:
        return layer_norm(x, self.of_last(name + ".weight"), self.of_last(name + ".bias"))

    def of_last(self, name: str) -> Array:
        return self.weights[f"encoder.layers.{self.layers - 1}.{name}"]
