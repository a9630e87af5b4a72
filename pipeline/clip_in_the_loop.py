"""Baselines for timing the student: prediction with CLIP's image tower. Weights are random; only the time matters."""

from typing import Any

import open_clip
import torch
from torch import Tensor, nn

LAYERS, HEADS = 3, 8


class DenseClip(nn.Module):
    """The frozen CLIP's dense prediction: cosine of its projected tokens and the text features."""

    def __init__(self, model: str, size: int) -> None:
        """`model`: an open_clip ViT. `size`: side of its images in pixels."""
        super().__init__()
        self.visual: Any = open_clip.create_model(model, pretrained=None, force_image_size=size).visual
        self.visual.output_tokens = True
        self.stride: int = self.visual.patch_size[0]

    def tokens(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, size, size) -> CLS token (B, C) and projected dense tokens (B, g, g, C), from one pass."""
        cls_token, tokens = self.visual(pixels)
        grid = pixels.shape[-1] // self.stride
        return cls_token, (tokens @ self.visual.proj).unflatten(1, (grid, grid))

    def forward(self, pixels: Tensor, text_features: Tensor) -> Tensor:
        """Logits (B, K, g, g)."""
        _, dense_tokens = self.tokens(pixels)
        return torch.einsum("bghc,kc->bkgh", nn.functional.normalize(dense_tokens, dim=-1), text_features)


class CrossAttentionLayer(nn.Module):
    """ZegCLIP's decoder layer: cross-attention from classes to tokens, no self-attention, then a feed-forward net."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """(B, K, C), (B, N, C) -> (B, K, C)."""
        queries = self.norm1(queries + self.attention(queries, tokens, tokens, need_weights=False)[0])
        return self.norm2(queries + self.feed_forward(queries))


class ClipInTheLoop(nn.Module):
    """The structure of ZegCLIP (Zhou et al. 2023): classes, conditioned on the CLS token, query the dense tokens.

    A class's mask is its match with the tokens after three decoder layers.
    """

    def __init__(self, clip: DenseClip) -> None:
        super().__init__()
        self.clip = clip
        width: int = clip.visual.output_dim
        self.relate = nn.Linear(2 * width, width)
        self.project = nn.Linear(width, width)
        self.layers = nn.ModuleList(CrossAttentionLayer(width) for _ in range(LAYERS))

    def forward(self, pixels: Tensor, text_features: Tensor) -> Tensor:
        """Images (B, 3, size, size), T (K, C) -> logits (B, K, g, g)."""
        cls_token, dense_tokens = self.clip.tokens(pixels)
        text = text_features.expand(len(pixels), -1, -1)
        queries = self.relate(torch.cat([text * cls_token[:, None], text], dim=-1))  # (B, K, C)
        tokens = self.project(dense_tokens)
        for layer in self.layers:
            queries = layer(queries, tokens.flatten(1, 2))
        return torch.einsum("bkc,bghc->bkgh", queries, tokens) / text.shape[-1] ** 0.5
