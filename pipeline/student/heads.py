"""Decode heads of standard segmentation models, with the final classifier replaced by a projection to CLIP's width.

`decode` returns the input of the last layer, `project`. Modules are named as in mmsegmentation, so its checkpoints fit.
"""

from typing import Any

import torch
from torch import Tensor, nn

DROPOUT = 0.1  # of whole channels before the last layer, in every head


def conv_norm_relu(in_channels: int, channels: int, kernel: int = 1, groups: int | None = None) -> nn.Sequential:
    """Convolution, norm, ReLU. `groups`: of group norm; None is batch norm."""
    norm = nn.GroupNorm(groups, channels) if groups else nn.BatchNorm2d(channels)
    conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, norm, nn.ReLU(inplace=True))


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) at `size`, bilinear."""
    return x if x.shape[-2:] == size else nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False)


class Head(nn.Module):
    """Levels (B, C_i, h_i, w_i), finest first, and the size of R -> R (B, width, *size)."""

    stride: int
    project: nn.Conv2d

    def forward(self, levels: list[Tensor], size: tuple[int, int]) -> Tensor:
        return self.project(self.decode(levels, size))

    def decode(self, levels: list[Tensor], size: tuple[int, int]) -> Tensor:
        """(B, channels, *size), what `project` takes."""
        raise NotImplementedError


class AllMLPHead(Head):
    """SegFormer's (Xie et al. 2021, Eq. 4, in mmsegmentation's form): R at stride 4, from levels of any stride."""

    stride = 4

    def __init__(self, in_channels: list[int], channels: int, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv_norm_relu(count, channels) for count in in_channels)
        self.fusion_conv = conv_norm_relu(channels * len(in_channels), channels)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.project = nn.Conv2d(channels, width, 1)

    def decode(self, levels: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Levels (B, C_i, h_i, w_i), finest first -> (B, channels, *size).

        The published head fuses the levels after bringing them to one size. Fusing is linear, as is that, so each level
        is fused at its own size and the sum is the same: a third of the multiplications.
        """
        fuse: Any = self.fusion_conv[0]
        shares = fuse.weight.split(fuse.out_channels, dim=1)  # of each level
        found = (
            resize(nn.functional.conv2d(conv(level), share), size)
            for conv, level, share in zip(self.convs, levels, shares, strict=True)
        )
        fused = next(found)
        for part in found:
            fused = fused.add_(part)  # in place: at stride 4 a copy takes as long as the sum
        return self.dropout(self.fusion_conv[1:](fused))


class UPerHead(Head):
    """UPerNet's (Xiao et al. 2018): pyramid pooling of the coarsest level, then a feature pyramid; R at stride 4."""

    stride = 4
    pools = (1, 2, 3, 6)

    def __init__(self, in_channels: list[int], channels: int, width: int) -> None:
        super().__init__()
        *finer, coarsest = in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(pool), conv_norm_relu(coarsest, channels)) for pool in self.pools
        )
        self.bottleneck = conv_norm_relu(coarsest + len(self.pools) * channels, channels, kernel=3)
        self.lateral_convs = nn.ModuleList(conv_norm_relu(count, channels) for count in finer)
        self.fpn_convs = nn.ModuleList(conv_norm_relu(channels, channels, kernel=3) for _ in finer)
        self.fpn_bottleneck = conv_norm_relu(channels * len(in_channels), channels, kernel=3)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.project = nn.Conv2d(channels, width, 1)

    def decode(self, levels: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Levels (B, C_i, h_i, w_i), finest first and at `size` -> (B, channels, *size)."""
        *finer, coarsest = levels
        pooled = [resize(pool(coarsest), _size(coarsest)) for pool in self.psp_modules]
        top = self.bottleneck(torch.cat([coarsest, *pooled], dim=1))
        laterals = [conv(level) for conv, level in zip(self.lateral_convs, finer, strict=True)] + [top]
        for index in reversed(range(len(finer))):
            laterals[index] = laterals[index] + resize(laterals[index + 1], _size(laterals[index]))
        outputs = [conv(level) for conv, level in zip(self.fpn_convs, laterals, strict=False)] + [top]
        fused = self.fpn_bottleneck(torch.cat([resize(level, size) for level in outputs], dim=1))
        return self.dropout(fused)


class FCNHead(nn.Module):
    """The auxiliary head, mmsegmentation's FCNHead of one convolution, at the stride of its one level."""

    def __init__(self, in_channels: int, channels: int, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList([conv_norm_relu(in_channels, channels, kernel=3)])
        self.dropout = nn.Dropout2d(DROPOUT)
        self.project = nn.Conv2d(channels, width, 1)

    def forward(self, level: Tensor) -> Tensor:
        """(B, C_i, h_i, w_i) -> (B, width, h_i, w_i)."""
        return self.project(self.dropout(self.convs[0](level)))


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[-2], x.shape[-1]
