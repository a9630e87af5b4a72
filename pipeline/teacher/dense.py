"""Dense tokens of a frozen CLIP ViT. The CLS token always comes from the unmodified last block."""

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn


def clearclip(visual: VisionTransformer, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """ClearCLIP (Lan et al. 2024): the last block's attention as softmax(q q^T / sqrt(d)) v, no residual, no FFN.

    Args:
        pixels: (B, 3, S, S) normalised images.

    Returns:
        CLS tokens (B, C), equal to open_clip's `encode_image`, and dense tokens (B, G, G, C); neither normalised.
    """
    tokens = visual._embeds(pixels)  # (B, 1 + G*G, W)
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        tokens = block(tokens)
    pooled, _ = visual._pool(last(tokens))
    cls_token = pooled @ visual.proj  # (B, C)

    attention = last.attn
    query, _, value = nn.functional.linear(last.ln_1(tokens), attention.in_proj_weight, attention.in_proj_bias).chunk(
        3, dim=-1
    )
    batch, count, width = query.shape
    heads = attention.num_heads

    def per_head(x: Tensor) -> Tensor:
        return x.view(batch, count, heads, width // heads).transpose(1, 2)  # (B, heads, 1 + G*G, d)

    mixed = nn.functional.scaled_dot_product_attention(per_head(query), per_head(query), per_head(value))
    mixed = attention.out_proj(mixed.transpose(1, 2).reshape(batch, count, width))
    dense = visual.ln_post(mixed[:, 1:]) @ visual.proj  # (B, G*G, C)
    side = int((count - 1) ** 0.5)
    return cls_token, torch.unflatten(dense, 1, (side, side))
