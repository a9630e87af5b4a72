"""The parts of transformer blocks, of open_clip's and of timm's, under the names that the dense variants use.

Each function repeats its block's forward up to the attention, and after it; tests hold `plain` against the block.
"""

from typing import Any

import torch
from open_clip.transformer import Attention as OpenClipAttention
from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock
from timm.layers.attention import Attention, AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from pipeline.teacher.dense import Block


def is_known(block: Any) -> bool:
    """Whether `parts` can take `block` apart. Exact types: a subclass may compute something else."""
    kinds = {
        ResidualAttentionBlock: (nn.MultiheadAttention,),
        CustomResidualAttentionBlock: (OpenClipAttention,),
        TimmBlock: (Attention,),
        EvaBlock: (EvaAttention, AttentionRope),
    }
    other_scores = getattr(block.attn, "scaled_cosine", False) or getattr(block.attn, "num_kv_groups", 1) > 1
    return type(block.attn) in kinds.get(type(block), ()) and not other_scores


def parts(block: Any, x: Tensor, rope: Tensor | None, grid: tuple[int, int]) -> Block:
    """Takes a known block apart for the tokens x (B, N, W) that enter it.

    Args:
        rope: timm's rotary embedding of the patches, where the tower has one.
        grid: rows and columns of the patches.
    """
    if isinstance(block, (TimmBlock, EvaBlock)):
        return _timm(block, x, rope, grid)
    return _open_clip(block, x, grid)


def per_head(x: Tensor, heads: int) -> Tensor:
    """(B, N, heads * d) -> (B, heads, N, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """(B, heads, N, d) -> (B, N, heads * d)."""
    return x.transpose(1, 2).flatten(2)


def _open_clip(block: Any, x: Tensor, grid: tuple[int, int]) -> Block:
    attention = block.attn
    qkv = nn.functional.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = (per_head(part, attention.num_heads) for part in qkv.chunk(3, dim=-1))
    custom = isinstance(block, CustomResidualAttentionBlock)
    if custom:
        q, k = attention.ln_q(q), attention.ln_k(k)

    def out(mixed: Tensor) -> Tensor:
        if not custom:
            return block.ls_1(attention.out_proj(joined(mixed)))
        scaled = mixed if attention.head_scale is None else mixed * attention.head_scale
        return block.ls_1(block.ln_attn(attention.out_proj(attention.ln_inner(joined(scaled)))))

    def ffn(tokens: Tensor) -> Tensor:
        return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))

    return Block(x, grid, q, k, v, out, ffn)


def _timm(block: Any, x: Tensor, rope: Tensor | None, grid: tuple[int, int]) -> Block:
    attention, normed = block.attn, block.norm1(x)
    if attention.qkv is None:
        qkv = [attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)]
    else:
        joint = attention.qkv(normed)
        if getattr(attention, "q_bias", None) is not None:
            joint = joint + torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        qkv = list(joint.chunk(3, dim=-1))
    q, k, v = (per_head(part, attention.num_heads) for part in qkv)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if rope is not None:
        first = attention.num_prefix_tokens
        q, k = (
            torch.cat([t[:, :, :first], apply_rot_embed_cat(t[:, :, first:], rope, half=attention.rotate_half)], dim=2)
            for t in (q, k)
        )

    def gain(number: int, added: Tensor) -> Tensor:
        if isinstance(block, EvaBlock):
            gamma = getattr(block, f"gamma_{number}")
            return added if gamma is None else gamma * added
        return getattr(block, f"ls{number}")(added)

    def out(mixed: Tensor) -> Tensor:
        values = attention.norm(joined(mixed))
        if attention.gate is not None:
            values = values * attention.gate(normed).sigmoid()
        return gain(1, attention.proj(values))

    def ffn(tokens: Tensor) -> Tensor:
        return tokens + gain(2, block.mlp(block.norm2(tokens)))

    return Block(x, grid, q, k, v, out, ffn)
