"""Every kind of image tower: S is open_clip's own, D is what the tower makes of each place alone, at any size."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm.layers
import torch
from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock
from timm.models import register_model
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from configs.schema import Teacher
from pipeline.teacher import blocks
from pipeline.teacher.clip import FrozenClip
from pipeline.teacher.dense import VARIANTS
from tests.pipeline.teacher.conftest import ARCHITECTURE, TEXT, draw_pixels, random_weights, refusal, write


def asked(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in ("num_classes", "global_pool") if name in kwargs}


@register_model
def tiny_siglip(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "class_token": False}
    return VisionTransformer(**(settings | {"global_pool": "map"} | asked(kwargs)))


@register_model
def tiny_eva_clip(pretrained: bool = False, **kwargs: Any) -> Eva:
    """As eva02_base_patch16_clip_224: rotary positions, separate projections, inner norms."""
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
    flags = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True}
    return Eva(**(settings | flags | {"use_rot_pos_emb": True, "ref_feat_shape": (4, 4)} | asked(kwargs)))


@register_model
def tiny_pe(pretrained: bool = False, **kwargs: Any) -> Eva:
    """As vit_pe_core: another attention class, pooled by attention, with a class token."""
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "attn_type": "rope"}
    rope = {"use_rot_pos_emb": True, "ref_feat_shape": (4, 4), "rope_grid_indexing": "xy", "rope_grid_offset": 1.0}
    return Eva(**(settings | rope | {"global_pool": "map", "use_pre_transformer_norm": True} | asked(kwargs)))


def timm_tower(name: str, pool: str = "", proj: str | None = None, size: int = 32) -> dict[str, Any]:
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": size}
    return {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}


def vit(**vision: Any) -> dict[str, Any]:
    return ARCHITECTURE | {"vision_cfg": ARCHITECTURE["vision_cfg"] | vision}


VITS = {
    "vit": vit(),
    "scaled layers": vit(ls_init_value=0.5),
    "custom block": vit(qk_norm=True, scale_heads=True, scale_attn_inner=True, scale_attn=True, scale_fc=True),
    "clipa": vit(no_ln_pre=True, pool_type="avg", final_ln_after_pool=True),
    "coca": vit(attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=3),
    "siglip": timm_tower("tiny_siglip", "map", "none"),
    "eva": timm_tower("tiny_eva_clip", "token"),
    "pe": timm_tower("tiny_pe", "map"),
    "timm's vit": timm_tower("test_vit", "token", size=160),
    "timm's vit, averaged": timm_tower("test_vit2", proj="linear", size=160),
    "timm's vit, pooled with registers": timm_tower("test_vit3", proj="mlp", size=160),
}
CONVOLUTIONAL = {
    "resnet": ARCHITECTURE | {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}},
    "convnext": timm_tower("test_convnext", proj="linear"),
    "convnext, mlp": timm_tower("test_convnext3", proj="mlp"),
}


def build(kind: str, folder: Path, dense: str) -> FrozenClip:
    architecture = (VITS | CONVOLUTIONAL)[kind]
    return FrozenClip(write(folder, architecture, random_weights(architecture), dense=dense))


def alone(teacher: FrozenClip, tokens: Tensor) -> Tensor:
    """Slowly, the pooled embedding of images of which only one token (N, W) is left after the last block."""
    visual, found = teacher.model.visual, []
    for token in tokens:
        if hasattr(visual, "trunk"):
            sequence = visual.trunk.norm(token[None, None].repeat(1, 1 + visual.trunk.num_prefix_tokens, 1))
            found.append(visual.head(visual.trunk.forward_head(sequence))[0])
        else:
            found.append((visual._pool(token[None, None].repeat(1, 2, 1))[0] @ visual.proj)[0])
    return torch.stack(found)


@pytest.mark.parametrize("kind", VITS)
def test_vits(kind: str, tmp_path: Path) -> None:
    """Plain tokens are the unmodified last block's, each pooled alone; at several sizes in turn, non-square too."""
    teacher = build(kind, tmp_path, "plain")
    visual, stride = teacher.model.visual, teacher.stride
    last = (visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks)[-1]
    for rows, columns in [(4, 4), (2, 5), (4, 4)]:
        pixels = draw_pixels(2, rows * stride, columns * stride)
        outputs: list[Tensor] = []
        hook = last.register_forward_hook(lambda *call, kept=outputs: kept.append(call[2]))
        cls_token, dense = teacher.encode(pixels)
        hook.remove()
        assert len(outputs) == 1, "one pass of the trunk"
        torch.testing.assert_close(cls_token, teacher.model.encode_image(pixels, normalize=False), rtol=0, atol=0)
        assert cls_token.shape == (2, 16) and dense.shape == (2, rows, columns, 16)
        expected = alone(teacher, outputs[0][1, -rows * columns :]).unflatten(0, (rows, columns))
        torch.testing.assert_close(dense[1], expected, rtol=1e-4, atol=1e-4)
        assert dense.std(dim=(1, 2)).mean() > 1e-3


@pytest.mark.parametrize("kind", VITS)
def test_variants_differ(kind: str, tmp_path: Path) -> None:
    """And leave S as it is."""
    pixels = draw_pixels(1, 160, 160 if "timm's" in kind else 96)
    found = [build(kind, tmp_path, variant).encode(pixels) for variant in VARIANTS]
    for index, (cls_token, dense) in enumerate(found):
        assert torch.equal(cls_token, found[0][0])
        assert all(not torch.allclose(dense, other, atol=1e-4) for _, other in found[:index])


@pytest.mark.parametrize("kind", ["vit", "clipa", "siglip", "eva", "pe"])
def test_force_image_size(kind: str, tmp_path: Path) -> None:
    """A teacher at 80 pixels, after other sizes, is open_clip's model made for 80 pixels."""
    config = write(tmp_path, VITS[kind], random_weights(VITS[kind]))
    teacher, pixels = FrozenClip(config), draw_pixels(2, 80)
    teacher.encode(draw_pixels(1, 16, 64))
    theirs = open_clip.create_model(Path(config.model).stem, pretrained=config.pretrained, force_image_size=80).eval()
    expected = theirs.encode_image(pixels).detach()
    torch.testing.assert_close(teacher.encode(pixels)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CONVOLUTIONAL)
def test_convolutional_towers(kind: str, tmp_path: Path) -> None:
    teacher = build(kind, tmp_path, "plain")
    assert teacher.stride == 32
    for rows, columns in [(2, 2), (3, 1)]:
        pixels = draw_pixels(2, rows * 32, columns * 32)
        cls_token, dense = teacher.encode(pixels)
        torch.testing.assert_close(cls_token, teacher.model.encode_image(pixels), rtol=0, atol=0)
        assert cls_token.shape == (2, 16) and dense.shape == (2, rows, columns, 16)
        assert dense.std(dim=(1, 2)).mean() > 1e-3


def test_resnet_places_are_values_of_its_pool(tmp_path: Path) -> None:
    """MaskCLIP's. At the native size the table of positions is the file's."""
    teacher, pixels = build("resnet", tmp_path, "plain"), draw_pixels(1, 64)
    visual = teacher.model.visual
    with torch.no_grad():
        x = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(pixels)))))
    pool = visual.attnpool
    for row, column in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        expected = pool.c_proj(pool.v_proj(x[0, :, row, column]))
        torch.testing.assert_close(teacher.encode(pixels)[1][0, row, column], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["convnext", "convnext, mlp"])
def test_an_image_of_one_place(kind: str, tmp_path: Path) -> None:
    """Where there is nothing to pool, S and D are the same."""
    cls_token, dense = build(kind, tmp_path, "plain").encode(draw_pixels(2, 32))
    torch.testing.assert_close(dense[:, 0, 0], cls_token)


@pytest.mark.parametrize("dense", [name for name in VARIANTS if name != "plain"])
@pytest.mark.parametrize("kind", CONVOLUTIONAL)
def test_convolutional_towers_have_plain_tokens_only(kind: str, dense: str, tmp_path: Path) -> None:
    architecture = CONVOLUTIONAL[kind]
    message = refusal(write(tmp_path, architecture, random_weights(architecture), dense=dense))
    assert message.startswith(f"teacher.dense={dense} ") and message.endswith("set teacher.dense=plain")


@pytest.mark.parametrize(
    "architecture",
    [
        timm_tower("test_vit_relpos", proj="linear", size=160),
        vit(attentional_pool="parallel", attn_pooler_heads=2),
        vit(scaled_cosine_attn=True),
    ],
)
def test_towers_without_dense_tokens(architecture: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(json.dumps(architecture))
    message = refusal(Teacher(model=str(tmp_path / "other.json"), pretrained="none", dense="plain"))
    assert message.startswith(f"teacher.model {tmp_path / 'other.json'}: dense tokens are not supported")
    assert message.endswith("choose a ViT-*, EVA*, RN* or convnext_* model")


BLOCKS: dict[str, nn.Module] = {}
with torch.random.fork_rng():
    torch.manual_seed(0)
    BLOCKS |= {
        "open_clip": ResidualAttentionBlock(16, 2),
        "open_clip, scaled": ResidualAttentionBlock(16, 2, ls_init_value=0.3),
        "custom": CustomResidualAttentionBlock(16, 2, qk_norm=True, scale_heads=True, scale_attn=True, scale_fc=True),
        "timm": Block(16, 2, qkv_bias=True, qk_norm=True, scale_attn_norm=True, init_values=0.3),
        "eva": EvaBlock(16, 2, init_values=0.3),
        "eva, fused": EvaBlock(16, 2, scale_attn_inner=True, rotate_half=True, gated_attn=True, qk_norm=True),
        "eva, separate": EvaBlock(16, 2, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, init_values=0.2),
        "eva, rope": EvaBlock(16, 2, attn_type="rope", gated_attn=True, attn_only_layer_scale=True, init_values=0.2),
    }


@pytest.mark.parametrize("kind", BLOCKS)
def test_plain_is_the_block(kind: str) -> None:
    """The parts, put together again."""
    block, generator = BLOCKS[kind].eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        x = torch.randn(2, 7, 16, generator=generator)
        rope = timm.layers.RotaryEmbeddingCat(8, feat_shape=(2, 3)).get_embed() if kind.startswith("eva") else None
        expected = block(x) if rope is None else block(x, rope=rope)
        assert blocks.is_known(block)
        found = VARIANTS["plain"](blocks.parts(block, x, rope, (2, 3)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_unknown_blocks() -> None:
    for block in (ResPostBlock(16, 2), EvaBlockPostNorm(16, 2), Block(16, 2, attn_layer="diff")):
        assert not blocks.is_known(block)
    shared = EvaBlock(16, 2, attn_type="rope", qkv_fused=False, num_kv_heads=1)
    assert not blocks.is_known(shared)
