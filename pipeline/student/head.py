"""SegFormer's all-MLP head (Xie et al. 2021, Eq. 4), its classifier replaced by a projection to CLIP's width."""

import torch
from torch import Tensor, nn


class AllMLPHead(nn.Module):
    """Levels of an encoder, finest first -> features R (B, width, h, w) at the finest level's stride."""

    def __init__(self, in_channels: list[int], channels: int, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Conv2d(count, channels, 1) for count in in_channels)
        self.fuse = nn.Sequential(
            nn.Conv2d(channels * len(in_channels), channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )
        self.dropout = nn.Dropout2d(dropout)
        self.project = nn.Conv2d(channels, width, 1)

    def forward(self, levels: list[Tensor]) -> Tensor:
        size = levels[0].shape[-2:]
        same_size = [
            nn.functional.interpolate(linear(level), size=size, mode="bilinear", align_corners=False)
            for linear, level in zip(self.linears, levels, strict=True)
        ]
        fused = self.fuse(torch.cat(same_size, dim=1))  # (B, channels, h, w)
        return self.project(self.dropout(fused))
