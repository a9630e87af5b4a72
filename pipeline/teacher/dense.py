"""Dense tokens of a ViT: five ways to compute its last block for the patches. S never comes from here.

| variant | paper |
|---|---|
| plain | the unmodified block |
| maskclip | Zhou et al. 2022, "Extract Free Dense Labels from CLIP" |
| sclip | Wang et al. 2023, "SCLIP: Rethinking Self-Attention for Dense Vision-Language Inference" |
| clearclip | Lan et al. 2024, "ClearCLIP: Decomposing CLIP Representations for Dense Vision-Language Inference" |
| naclip | Hajimiri et al. 2025, "Pay Attention to Your Neighbours" |
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

NACLIP_STD = 5.0  # tokens


class Block(NamedTuple):
    """The parts of a block that the variants use, for input tokens x (B, N, W).

    Attributes:
        grid: rows and columns of the patches, which are the last tokens; class and register tokens come first.
        q, k, v: (B, heads, N, d), as they enter the attention.
        out: mixed values (B, heads, N, d) -> what the attention branch adds to the tokens, (B, N, W).
        ffn: tokens (B, N, W) -> tokens after the feed-forward network and its residual.
    """

    x: Tensor
    grid: tuple[int, int]
    q: Tensor
    k: Tensor
    v: Tensor
    out: Callable[[Tensor], Tensor]
    ffn: Callable[[Tensor], Tensor]


# softmax(q k^T / sqrt(d) + added) v
attend = nn.functional.scaled_dot_product_attention


def neighbours(b: Block) -> Tensor:
    """NACLIP's omega (N, N): exp(-distance^2 / (2 std^2)) between patches, 0 to and from the other tokens.

    The Gaussian of two axes is the product of those of one.
    """

    def along(length: int) -> Tensor:
        place = torch.arange(length, dtype=b.x.dtype, device=b.x.device)
        return torch.exp(-((place[:, None] - place) ** 2) / (2 * NACLIP_STD**2))

    others = b.x.shape[1] - b.grid[0] * b.grid[1]
    return nn.functional.pad(torch.kron(along(b.grid[0]), along(b.grid[1])), (others, 0, others, 0))


# Block -> tokens (B, N, W), which the tower's final norm and projection follow.
VARIANTS: dict[str, Callable[[Block], Tensor]] = {
    "plain": lambda b: b.ffn(b.x + b.out(attend(b.q, b.k, b.v))),
    "maskclip": lambda b: b.ffn(b.x + b.out(b.v)),
    "sclip": lambda b: b.ffn(b.x + b.out(attend(b.q, b.q, b.v) + attend(b.k, b.k, b.v))),
    "clearclip": lambda b: b.out(attend(b.q, b.q, b.v)),
    "naclip": lambda b: b.out(attend(b.k, b.k, b.v, neighbours(b))),
}
