"""SegNeXt's encoder, MSCAN (Guo et al. 2022, section 3.1): convolutions alone, attending by multiplication.

The parts of a block are named as in the official checkpoints.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

EXPANSIONS = (8, 8, 4, 4)  # of the feed-forward layers, stage by stage
LAYER_SCALE = 1e-2


def _depthwise(channels: int, height: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, (height, width), padding=(height // 2, width // 2), groups=channels)


class MultiScaleAttention(nn.Module):
    """Eq. 1 of SegNeXt: 1 x 1 of (DW5 x + sum of its strips of 7, 11 and 21), times x."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv0 = _depthwise(channels, 5, 5)
        self.conv0_1, self.conv0_2 = _depthwise(channels, 1, 7), _depthwise(channels, 7, 1)
        self.conv1_1, self.conv1_2 = _depthwise(channels, 1, 11), _depthwise(channels, 11, 1)
        self.conv2_1, self.conv2_2 = _depthwise(channels, 1, 21), _depthwise(channels, 21, 1)
        self.conv3 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        local = self.conv0(x)
        strips = (
            self.conv0_2(self.conv0_1(local)) + self.conv1_2(self.conv1_1(local)) + self.conv2_2(self.conv2_1(local))
        )
        return self.conv3(local + strips) * x


class Attention(nn.Module):
    """Multi-scale attention between two 1 x 1 convolutions, beside a residual of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(channels, channels, 1)
        self.spatial_gating_unit = MultiScaleAttention(channels)
        self.proj_2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_2(self.spatial_gating_unit(nn.functional.gelu(self.proj_1(x))))


class FeedForward(nn.Module):
    """1 x 1, depthwise 3 x 3, GELU, 1 x 1."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.dwconv = _depthwise(hidden, 3, 3)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.dwconv(self.fc1(x))))


class Block(nn.Module):
    """Attention, then the feed-forward layer; batch norm before each, layer scale after."""

    def __init__(self, channels: int, expansion: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.BatchNorm2d(channels), Attention(channels)
        self.norm2, self.mlp = nn.BatchNorm2d(channels), FeedForward(channels, channels * expansion)
        self.layer_scale_1 = nn.Parameter(torch.full((channels,), LAYER_SCALE))
        self.layer_scale_2 = nn.Parameter(torch.full((channels,), LAYER_SCALE))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.layer_scale_1[:, None, None] * self.attn(self.norm1(x)))
        return x + self.drop_path(self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x)))


class Stem(nn.Module):
    """Two strided convolutions: stride 4."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.proj = nn.Sequential(
            nn.Conv2d(3, half, 3, 2, 1), nn.BatchNorm2d(half), nn.GELU(),
            nn.Conv2d(half, channels, 3, 2, 1), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels)


class Downsample(nn.Module):
    """One strided convolution and its norm."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(in_channels, channels, 3, 2, 1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class Stage(nn.Module):
    """(B, C_in, h, w) -> (B, C, h / 2, w / 2); the first stage has no downsampling of its own."""

    def __init__(self, in_channels: int | None, channels: int, expansion: int, drop_paths: list[float]) -> None:
        super().__init__()
        self.downsample = Downsample(in_channels, channels) if in_channels else nn.Identity()
        self.blocks = nn.Sequential(*(Block(channels, expansion, rate) for rate in drop_paths))
        self.norm = nn.LayerNorm(channels)
        self.checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            x = _recomputed(block, x) if self.checkpointing and torch.is_grad_enabled() else block(x)
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MSCAN(nn.Module):
    """Image (B, 3, H, W) -> levels at strides 4, 8, 16, 32; H and W are multiples of 32."""

    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    multiple = 32

    def __init__(self, channels: tuple[int, ...], depths: tuple[int, ...], drop_path: float) -> None:
        super().__init__()
        self.channels = list(channels)
        rates = torch.linspace(0, drop_path, sum(depths)).split(depths)
        self.patch_embed = Stem(channels[0])
        self.stages = nn.Sequential(
            *(
                Stage(before, after, expansion, rate.tolist())
                for before, after, expansion, rate in zip((None, *channels), channels, EXPANSIONS, rates, strict=False)
            )
        )
        self.apply(_initialise)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Named as timm's."""
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.checkpointing = enable

    def forward(self, pixels: Tensor) -> list[Tensor]:
        x, levels = self.patch_embed(pixels), []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        return levels


def _recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """The block's output, its inner activations forgotten until the backward pass."""

    @contextmanager
    def again() -> Iterator[None]:
        """The running statistics have seen this batch already."""
        momenta = {m: m.momentum for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        for norm in momenta:
            norm.momentum = 0.0
        yield
        for norm, momentum in momenta.items():
            norm.momentum = momentum

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), again()

    result: Tensor = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
    return result


def _initialise(module: nn.Module) -> None:
    """He's normal initialisation by fan-out, as the official code trains from."""
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
