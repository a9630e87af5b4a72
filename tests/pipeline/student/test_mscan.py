"""SegNeXt's encoder against section 3.1 of its paper, in NumPy."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.student.families import family_of
from pipeline.student.mscan import MSCAN, Block
from tests.pipeline.student.layers import as_array, batch_norm, convolve, gelu, layer_norm, randomise
from tests.reference import Array


def attention_by_hand(x: Array, attention: Any) -> Array:
    """1 x 1 and GELU; 5 x 5, strips of 7, 11 and 21, their sum, 1 x 1, times what came in; 1 x 1; the residual."""
    inner = gelu(convolve(x, attention.proj_1))
    gate = attention.spatial_gating_unit
    local = convolve(inner, gate.conv0, depthwise=True)
    scales = local.copy()
    for number in (0, 1, 2):
        row, column = getattr(gate, f"conv{number}_1"), getattr(gate, f"conv{number}_2")
        scales += convolve(convolve(local, row, depthwise=True), column, depthwise=True)
    return x + convolve(convolve(scales, gate.conv3) * inner, attention.proj_2)


def block_by_hand(x: Array, block: Any) -> Array:
    def scaled(values: Array, scale: Any) -> Array:
        return values * as_array(scale)[:, None, None]

    x = x + scaled(attention_by_hand(batch_norm(x, block.norm1), block.attn), block.layer_scale_1)
    hidden = convolve(batch_norm(x, block.norm2), block.mlp.fc1)
    hidden = gelu(convolve(hidden, block.mlp.dwconv, depthwise=True))
    return x + scaled(convolve(hidden, block.mlp.fc2), block.layer_scale_2)


def encoder_by_hand(x: Array, encoder: Any) -> list[Array]:
    stem = encoder.patch_embed.proj
    x = batch_norm(convolve(gelu(batch_norm(convolve(x, stem[0], stride=2), stem[1])), stem[3], stride=2), stem[4])
    levels = []
    for number, stage in enumerate(encoder.stages):
        if number:
            x = batch_norm(convolve(x, stage.downsample.proj, stride=2), stage.downsample.norm)
        for block in stage.blocks:
            x = block_by_hand(x, block)
        x = layer_norm(x, stage.norm)
        levels.append(x)
    return levels


def images(channels: int, height: int, width: int) -> dict[str, Array]:
    random = np.random.default_rng(0).normal(size=(2, channels, height, width))
    spike = np.zeros_like(random)
    spike[1, -1, height // 2, width // 3] = 50
    return {"random": random, "zeros": np.zeros_like(random), "constant": np.full_like(random, 2.5), "spike": spike}


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 2), (13, 9), (24, 25)])
@pytest.mark.parametrize("expansion", [4, 8])
def test_block(expansion: int, height: int, width: int) -> None:
    block = Block(5, expansion, drop_path=0.5).double().eval()
    randomise(block)
    for name, image in images(5, height, width).items():
        found = as_array(block(torch.from_numpy(image)))
        np.testing.assert_allclose(found, block_by_hand(image, block), rtol=1e-9, atol=1e-9, err_msg=name)


def test_kernels() -> None:
    """Their shapes, and that a strip reaches as far as it should."""
    gate = Block(3, 4, 0.0).attn.spatial_gating_unit
    wanted = {"0": (5, 5), "0_1": (1, 7), "0_2": (7, 1), "1_1": (1, 11), "1_2": (11, 1), "2_1": (1, 21), "2_2": (21, 1)}
    for name, kernel in wanted.items():
        conv = getattr(gate, f"conv{name}")
        assert conv.kernel_size == kernel and conv.groups == 3 and conv.bias is not None
    x = torch.zeros(1, 3, 61, 61)
    x[..., 30, 30] = 1
    for parameter in gate.parameters():
        nn.init.ones_(parameter) if parameter.ndim > 1 else nn.init.zeros_(parameter)
    pixels = x.clone() + 1  # a gate of ones: the product shows where the spike is seen
    seen = (gate(pixels) - gate(torch.ones_like(x)))[0, 0].abs() > 1e-3
    rows, columns = seen.any(dim=1).nonzero().flatten(), seen.any(dim=0).nonzero().flatten()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (18, 42, 18, 42)  # 2 of 5 x 5, 10 of the strips


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96)])
def test_encoder(height: int, width: int) -> None:
    encoder = MSCAN((4, 6, 8, 10), (1, 2, 1, 1), 0.3).double().eval()
    randomise(encoder)
    for name, image in images(3, height, width).items():
        levels = encoder(torch.from_numpy(image))
        for stride, found, expected in zip((4, 8, 16, 32), levels, encoder_by_hand(image, encoder), strict=True):
            assert found.shape[2:] == (height // stride, width // stride)
            np.testing.assert_allclose(as_array(found), expected, rtol=1e-8, atol=1e-8, err_msg=name)


@pytest.mark.parametrize(
    ("name", "channels", "depths", "rate"),
    [
        ("t", (32, 64, 160, 256), (3, 3, 5, 2), 0.1),
        ("s", (64, 128, 320, 512), (2, 2, 4, 2), 0.1),
        ("b", (64, 128, 320, 512), (3, 3, 12, 3), 0.1),
        ("l", (64, 128, 320, 512), (3, 5, 27, 3), 0.3),
    ],
)
def test_stages(name: str, channels: tuple[int, ...], depths: tuple[int, ...], rate: float) -> None:
    """Table 2's widths, depths and expansions, and the shape that each stage gives."""
    encoder: Any = family_of(f"segnext-{name}").encoder(False, rate).eval()
    with torch.inference_mode():
        levels = encoder(torch.randn(1, 3, 32, 64))
    assert [tuple(level.shape) for level in levels] == [
        (1, count, 32 // stride, 64 // stride) for count, stride in zip(channels, (4, 8, 16, 32), strict=True)
    ]
    assert encoder.channels == list(channels) and encoder.multiple == 32
    assert [len(stage.blocks) for stage in encoder.stages] == list(depths)
    hidden = [stage.blocks[0].mlp.fc1.out_channels // stage.blocks[0].mlp.fc1.in_channels for stage in encoder.stages]
    assert hidden == [8, 8, 4, 4]
    rates = [block.drop_path.drop_prob for stage in encoder.stages for block in stage.blocks]
    np.testing.assert_allclose(rates, np.linspace(0, rate, sum(depths)), atol=1e-7)


def test_initial_values() -> None:
    """Layer scale 0.01; convolutions normal with variance 2 / fan-out (of one group); biases zero."""
    torch.manual_seed(0)
    encoder: Any = MSCAN((64, 96, 32, 32), (1, 1, 1, 1), 0.0)
    block = encoder.stages[1].blocks[0]
    assert (block.layer_scale_1 == 0.01).all() and (block.layer_scale_2 == 0.01).all()
    for conv, fan_out in [
        (block.mlp.fc1, 8 * 96), (block.mlp.dwconv, 9), (block.attn.proj_1, 96), (encoder.patch_embed.proj[3], 9 * 64),
        (block.attn.spatial_gating_unit.conv2_1, 21),
    ]:  # fmt: skip
        assert not conv.bias.any()
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.06)


def test_drop_path_is_for_training() -> None:
    """Whole images skip a branch, the others are made up for it."""
    torch.manual_seed(0)
    block = Block(4, 4, drop_path=0.5)
    for scale in (block.layer_scale_1, block.layer_scale_2):
        nn.init.ones_(scale)
    nn.init.zeros_(block.mlp.fc2.weight)
    nn.init.zeros_(block.mlp.fc2.bias)
    for norm in (block.norm1, block.norm2):
        norm.eval()
    x = torch.randn(64, 4, 6, 6)
    change = (block(x) - x).detach()
    skipped = (change == 0).flatten(1).all(dim=1)
    assert 0.2 < skipped.float().mean() < 0.8
    torch.testing.assert_close(change[~skipped], 2 * (block.eval()(x) - x).detach()[~skipped])
