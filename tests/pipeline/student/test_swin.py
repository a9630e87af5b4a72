"""Swin's levels: timm's own features, transformers' where all windows are whole, and a norm after each."""

from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn
from transformers import SwinConfig, SwinModel

from pipeline.student.timm_encoder import Swin
from tests.pipeline.student.layers import as_array, layer_norm, randomise

NAME = "swin_tiny_patch4_window7_224"
CHANNELS = [96, 192, 384, 768]


@pytest.fixture(scope="module")
def swin() -> Any:
    """Ours in float64, every weight random."""
    ours = Swin(NAME, False, 0.3).double().eval()
    randomise(ours)
    return ours


@pytest.fixture(scope="module")
def timms(swin: Any) -> Any:
    """Features by timm with the weights of ours; where ours has `layers.0`, timm's has `layers_0`."""
    options = {"strict_img_size": False, "always_partition": True}
    theirs: Any = timm.create_model(NAME, features_only=True, **options).double().eval()
    state = {key.replace("layers.", "layers_"): tensor for key, tensor in swin.model.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not missing and not unexpected
    return theirs


def images(height: int, width: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(1, 3, height, width, generator=generator, dtype=torch.float64)
    return {"random": random, "zeros": torch.zeros_like(random), "constant": torch.full_like(random, 2)}


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96), (224, 64), (160, 128)])
def test_levels_are_timms(height: int, width: int, swin: Any, timms: Any) -> None:
    """Followed by a layer norm; also where the windows of 7 x 7 are not whole."""
    for name, image in images(height, width).items():
        with torch.inference_mode():
            found, features = swin(image), [level.permute(0, 3, 1, 2) for level in timms(image)]
        for stride, count, level, raw, norm in zip((4, 8, 16, 32), CHANNELS, found, features, swin.norms, strict=True):
            assert level.shape == (1, count, height // stride, width // stride)
            np.testing.assert_allclose(as_array(level), layer_norm(as_array(raw), norm), 1e-7, 1e-7, err_msg=name)


def copy(source: Any, target: Any) -> None:
    with torch.no_grad():
        for name, parameter in target.named_parameters(recurse=False):
            parameter.copy_(getattr(source, name))


def transformers_of(ours: Any) -> Any:
    """Transformers' Swin with the weights of ours; there a level's merging comes at its end, here at its beginning."""
    theirs: Any = SwinModel(SwinConfig(image_size=224), add_pooling_layer=False).double().eval()
    copy(ours.patch_embed.proj, theirs.embeddings.patch_embeddings.projection)
    copy(ours.patch_embed.norm, theirs.embeddings.norm)
    for number, (own, other) in enumerate(zip(ours.layers, theirs.encoder.layers, strict=True)):
        if number:
            merging = theirs.encoder.layers[number - 1].downsample
            copy(own.downsample.norm, merging.norm)
            copy(own.downsample.reduction, merging.reduction)
        for block, twin in zip(own.blocks, other.blocks, strict=True):
            copy(block.norm1, twin.layernorm_before)
            copy(block.norm2, twin.layernorm_after)
            copy(block.mlp.fc1, twin.mlp.fc1)
            copy(block.mlp.fc2, twin.mlp.fc2)
            copy(block.attn.proj, twin.attention.o_proj)
            copy(block.attn, twin.attention.relative_position_bias)
            names = ("q_proj", "k_proj", "v_proj")
            with torch.no_grad():
                for name, weight, bias in zip(
                    names, block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True
                ):
                    getattr(twin.attention, name).weight.copy_(weight)
                    getattr(twin.attention, name).bias.copy_(bias)
    return theirs


def test_levels_are_transformers(swin: Any) -> None:
    """At a size where windows are whole and shifted in every level: code that shares nothing with timm's."""
    theirs = transformers_of(swin.model)
    image = images(448, 448)["random"]
    with torch.inference_mode():
        found = swin(image)
        features = theirs(
            image, output_hidden_states=True, output_hidden_states_before_downsampling=True
        ).reshaped_hidden_states[-4:]
    for level, raw, norm in zip(found, features, swin.norms, strict=True):
        np.testing.assert_allclose(as_array(level), layer_norm(as_array(raw), norm), 1e-6, 1e-6)


def test_the_classifiers_norm_is_gone(swin: Any) -> None:
    """What no level uses would get no gradient."""
    assert isinstance(swin.model.norm, nn.Identity)
    assert not [name for name, _ in swin.named_parameters() if name.startswith(("model.norm", "model.head"))]
    assert [norm.normalized_shape for norm in swin.norms] == [(count,) for count in CHANNELS]
    assert swin.mean == (0.485, 0.456, 0.406) and swin.std == (0.229, 0.224, 0.225) and swin.multiple == 32


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_drop_path_grows_with_depth(rate: float) -> None:
    """Linearly from 0 in the first block to the setting in the last."""
    blocks = [block for layer in Swin(NAME, False, rate).model.layers for block in layer.blocks]
    for name in ("drop_path1", "drop_path2"):
        rates = [getattr(getattr(block, name), "drop_prob", 0.0) for block in blocks]
        assert rates == pytest.approx([rate * i / 11 for i in range(12)], abs=1e-6)
