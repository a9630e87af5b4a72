"""SegFormer's encoder against transformers', with the same weights; the names are paired here by hand."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import SegformerConfig, SegformerModel

from pipeline.student.families import family_of
from tests.pipeline.student.layers import randomise

# The paper's Table 6: widths and depths.
SIZES = {"b0": ([32, 64, 160, 256], [2, 2, 2, 2]), "b2": ([64, 128, 320, 512], [3, 4, 6, 3])}


def copy(source: Any, target: Any) -> None:
    """One module's weight and bias."""
    with torch.no_grad():
        target.weight.copy_(source.weight)
        target.bias.copy_(source.bias)


def copy_weights(theirs: Any, ours: Any) -> None:
    """Theirs into ours; theirs get the official epsilons: 1e-6 for a block's and a stage's norms, 1e-5 elsewhere."""
    for number, (stage, own) in enumerate(zip(theirs.stages, ours.stages, strict=True)):
        embedding = own.downsample if number else ours.patch_embed
        copy(stage.patch_embeddings.proj, embedding.proj)
        copy(stage.patch_embeddings.layer_norm, embedding.norm)
        copy(stage.layer_norm, own.norm)
        stage.layer_norm.eps = 1e-6
        for block, own_block in zip(stage.blocks, own.blocks, strict=True):
            attention, own_attention = block.attention, own_block.attn
            copy(block.layernorm_before, own_block.norm1)
            copy(block.layernorm_after, own_block.norm2)
            block.layernorm_before.eps = block.layernorm_after.eps = 1e-6
            copy(attention.q_proj, own_attention.q)
            copy(attention.o_proj, own_attention.proj)
            with torch.no_grad():
                for name in ("weight", "bias"):
                    both = [getattr(attention.k_proj, name), getattr(attention.v_proj, name)]
                    getattr(own_attention.kv, name).copy_(torch.cat(both))
            if number < 3:
                copy(attention.sequence_reduction.sequence_reduction, own_attention.sr)
                copy(attention.sequence_reduction.layer_norm, own_attention.norm)
            copy(block.mlp.fc1, own_block.mlp.fc1)
            copy(block.mlp.dwconv.dwconv, own_block.mlp.dwconv)
            copy(block.mlp.fc2, own_block.mlp.fc2)


@pytest.fixture(scope="module", params=list(SIZES))
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Transformers' encoder and ours, in float64."""
    widths, depths = SIZES[request.param]
    theirs = SegformerModel(SegformerConfig(hidden_sizes=widths, depths=depths)).double().eval()  # type: ignore[no-untyped-call]
    ours: Any = family_of(f"segformer-{request.param}").encoder(False, 0.1).double().eval()
    randomise(theirs)
    for parameter in ours.parameters():  # whatever is not copied shows
        nn.init.constant_(parameter, 1e6)
    copy_weights(theirs, ours)
    return theirs, ours


def images(height: int, width: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(1, 3, height, width, generator=generator, dtype=torch.float64)
    faint = 1e-3 * random  # small variances: the norms' epsilons count
    return {"random": random, "faint": faint, "zeros": torch.zeros_like(random), "constant": torch.full_like(random, 2)}


@pytest.mark.parametrize(("height", "width"), [(64, 96), (128, 128), (32, 32)])
def test_levels(height: int, width: int, pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    for name, image in images(height, width).items():
        with torch.inference_mode():
            expected = theirs(image, output_hidden_states=True).hidden_states
            found = ours(image)
        assert len(found) == len(expected) == 4, name
        for stride, count, one, other in zip((4, 8, 16, 32), ours.channels, found, expected, strict=True):
            assert one.shape == (1, count, height // stride, width // stride)
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def test_in_float32(pair: tuple[Any, Any]) -> None:
    """Within 1e-5 as it will be used."""
    theirs, ours = (model.float() for model in pair)
    try:
        image = images(64, 96)["random"].float()
        with torch.inference_mode():
            for one, other in zip(ours(image), theirs(image, output_hidden_states=True).hidden_states, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    finally:
        theirs.double(), ours.double()


def test_epsilons(pair: tuple[Any, Any]) -> None:
    """As in the official code, which trained the published weights."""
    for name, module in pair[1].named_modules():
        if isinstance(module, nn.LayerNorm):
            embedding = name.startswith("patch_embed") or "downsample" in name or ".attn." in name
            assert module.eps == (1e-5 if embedding else 1e-6), name


def test_drop_path_grows_with_depth() -> None:
    """Linearly from 0 in the first block to the setting in the last."""
    ours: Any = family_of("segformer-b2").encoder(False, 0.3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for stage in ours.stages for block in stage.blocks]
    assert rates == pytest.approx([0.3 * i / 15 for i in range(16)], abs=1e-6)
