"""Any timm model as an encoder: plain ViTs by a feature pyramid, NHWC models, windows, and models that are refused."""

from typing import Any

import numpy as np
import pytest
import timm
import torch

from configs.errors import UserError
from pipeline.student.timm_encoder import FeaturePyramid, TimmEncoder
from tests.pipeline.student.layers import as_array, gelu, group_norm, randomise
from tests.reference import Array


def encoder(name: str) -> Any:
    torch.manual_seed(0)
    return TimmEncoder(name, False, 0.0).eval()


def transposed(x: Array, layer: Any) -> Array:
    """Every cell becomes 2 x 2 of its own."""
    weight = as_array(layer.weight)  # (C, N, 2, 2)
    assert weight.shape[2:] == (2, 2)
    batch, _, height, width = x.shape
    out = np.zeros((batch, weight.shape[1], 2 * height, 2 * width))
    for i, j in np.ndindex(2, 2):
        out[:, :, i::2, j::2] = np.einsum("bchw,cn->bnhw", x, weight[:, :, i, j])
    return out + as_array(layer.bias)[:, None, None]


def pyramid_by_hand(pyramid: Any, x: Array) -> list[Array]:
    """ViTDet: two transposed convolutions, one, none, and a maximum over 2 x 2."""
    batch, channels, height, width = x.shape
    first, norm, _, second = pyramid.to_4
    half = group_norm(transposed(x, first), norm, groups=1)
    coarse = x[:, :, : height // 2 * 2, : width // 2 * 2].reshape(batch, channels, height // 2, 2, width // 2, 2)
    return [transposed(gelu(half), second), transposed(x, pyramid.to_8), x, coarse.max(axis=(3, 5))]


@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 6), (8, 2)])
def test_feature_pyramid(height: int, width: int) -> None:
    pyramid = FeaturePyramid(8).double()
    randomise(pyramid)
    random = np.random.default_rng(0).normal(size=(2, 8, height, width))
    for x in (random, np.zeros_like(random), np.full_like(random, 2)):
        levels = pyramid(torch.from_numpy(x))
        for count, found, expected in zip(pyramid.channels, levels, pyramid_by_hand(pyramid, x), strict=True):
            assert found.shape[1] == count
            np.testing.assert_allclose(as_array(found), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["test_vit", "eva02_tiny_patch14_224", "xcit_nano_12_p8_224", "vit_tiny_r_s16_p8_224"])
def test_plain_vit(name: str) -> None:
    """Strides 4, 8, 16, 32 for patches of 16, 14, 8 and 32, and the third level is the last tokens."""
    model = encoder(name)
    seen: list[Any] = []
    model.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pixels = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        levels = model(pixels)
        tokens = model.model(seen[0])[-1]
    assert model.multiple == 32
    sizes = [(64 // stride, 96 // stride) for stride in (4, 8, 16, 32)]
    assert [tuple(level.shape) for level in levels] == [
        (2, count, *size) for count, size in zip(model.channels, sizes, strict=True)
    ]
    assert tokens.shape == (2, model.channels[2], 4, 6)
    torch.testing.assert_close(levels[2], tokens, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "patch"), [("test_vit", 16), ("eva02_tiny_patch14_224", 14), ("xcit_nano_12_p8_224", 8)]
)
def test_plain_vit_sees_a_token_as_16_pixels(name: str, patch: int) -> None:
    """The image at patch / 16 of its size, bicubic with anti-aliasing; as it is for a patch of 16."""
    model = encoder(name)
    seen: list[Any] = []
    model.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ramp = torch.linspace(-1, 1, 128).expand(1, 3, 64, 128).contiguous()
    noise = torch.randn(1, 3, 64, 128)
    with torch.inference_mode():
        for pixels in (ramp, noise, torch.full_like(ramp, 0.7)):
            model(pixels)
    assert all(image.shape == (1, 3, 4 * patch, 8 * patch) for image in seen)
    if patch == 16:
        assert torch.equal(seen[0], ramp) and torch.equal(seen[1], noise)
    places = (torch.arange(8 * patch) + 0.5) * 16 / patch - 0.5  # of its pixels in the image
    inner = slice(patch, -patch)
    torch.testing.assert_close(
        seen[0][0, 0, 0, inner], (2 * places / 127 - 1)[inner], rtol=0, atol=2e-3 if patch != 16 else 1e-6
    )
    torch.testing.assert_close(seen[2], torch.full_like(seen[2], 0.7))
    if patch == 8:  # a shrunken image is smoothed
        assert seen[1].std() < 0.5 * noise.std()


@pytest.mark.parametrize("name", ["test_mambaout", "swin_tiny_patch4_window7_224"])
def test_nhwc_models(name: str) -> None:
    """Levels are (B, C, h, w), with timm's own values."""
    model = encoder(name)
    pixels = torch.randn(2, 3, 32, 64)
    with torch.inference_mode():
        levels, theirs = model(pixels), model.model(pixels)
    for stride, count, level, own in zip((4, 8, 16, 32), model.channels, levels, theirs, strict=True):
        assert own.shape == (2, 32 // stride, 64 // stride, count)  # the model's order is the other one
        assert level.shape == (2, count, 32 // stride, 64 // stride)
        assert torch.equal(level[1, :, -1, 0], own[1, -1, 0])


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_levels_begin_at_stride_4(name: str) -> None:
    """Finer ones are left out; the others are timm's own of the same weights, finest first."""
    model = encoder(name)
    theirs = timm.create_model(name, pretrained=False, features_only=True).eval()
    theirs.load_state_dict(model.model.state_dict())
    strides = theirs.feature_info.reduction()  # type: ignore[operator, union-attr]
    pixels = torch.randn(1, 3, 64, 32)
    with torch.inference_mode():
        expected = [level for level, stride in zip(theirs(pixels), strides, strict=True) if stride >= 4]
        for found, other in zip(model(pixels), expected, strict=True):
            torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-4)
    assert model.channels == [level.shape[1] for level in expected]
    assert [level.shape[2] for level in expected] == [16, 8, 4, 2] and model.multiple == 32


def test_encoder_without_stride_4() -> None:
    """Two levels, of strides 7 and 14, serve as well."""
    model = encoder("sequencer2d_s")
    with torch.inference_mode():
        levels = model(torch.randn(1, 3, 28, 56))
    assert [tuple(level.shape) for level in levels[:2]] == [(1, 192, 4, 8), (1, 384, 2, 4)]
    assert model.channels == [level.shape[1] for level in levels]


def test_no_level_of_stride_4_or_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only finer levels: nothing to decode."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, out_indices=[0], **options))
    with pytest.raises(UserError, match=r"^student.model timm:test_resnet has no features with a stride of 4 or more"):
        TimmEncoder("test_resnet", False, 0.0)


@pytest.mark.parametrize("name", ["pit_ti_224", "levit_128s", "convit_tiny"])
def test_models_of_one_size_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"^student.model timm:{name} does not accept images of every size \(.+\)"):
        TimmEncoder(name, False, 0.0)


@pytest.mark.parametrize("name", ["resnet5O", "", "no such model"])
def test_unknown_name(name: str) -> None:
    with pytest.raises(UserError, match=rf"^student.model timm:{name} cannot be made by timm: "):
        TimmEncoder(name, False, 0.0)


def test_windows_of_a_fixed_count() -> None:
    """MaxViT attends within and between windows of its native size: whole multiples of that, and any number of them."""
    model = encoder("maxvit_rmlp_pico_rw_256")
    assert model.multiple == 256
    with torch.inference_mode():
        levels = model(torch.randn(1, 3, 256, 512))
        assert [tuple(level.shape[2:]) for level in levels] == [(64, 128), (32, 64), (16, 32), (8, 16)]
        with pytest.raises((RuntimeError, AssertionError)):  # what the multiple is for
            model.model(torch.randn(1, 3, 32, 64))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "maxvit_rmlp_pico_rw_256"])
def test_the_trial_leaves_no_trace(name: str) -> None:
    """Constructing tries a size; the model is in training mode afterwards, its statistics fresh, gradients on."""
    model = TimmEncoder(name, False, 0.0)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    for key, value in model.named_buffers():
        if key.endswith("num_batches_tracked"):
            assert value == 0


def test_normalisation_is_the_models() -> None:
    """One half for test_vit, ImageNet's for edgenext."""
    half, imagenet = encoder("test_vit"), encoder("edgenext_xx_small")
    assert half.mean == half.std == (0.5, 0.5, 0.5)
    assert imagenet.mean == (0.485, 0.456, 0.406) and imagenet.std == (0.229, 0.224, 0.225)
