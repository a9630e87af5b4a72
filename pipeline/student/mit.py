"""SegFormer's encoder, Mix Transformer (Xie et al. 2021): timm's Pyramid Vision Transformer v2 with its numbers."""

from functools import partial

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from torch import Tensor, nn


class MiT(PyramidVisionTransformerV2):
    """Image (B, 3, H, W) -> levels at strides 4, 8, 16, 32; H and W are multiples of 32."""

    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    multiple = 32

    def __init__(self, channels: tuple[int, ...], depths: tuple[int, ...], drop_path: float) -> None:
        super().__init__(
            num_classes=0, embed_dims=channels, depths=depths, num_heads=(1, 2, 5, 8), mlp_ratios=(4, 4, 4, 4),
            drop_path_rate=drop_path, norm_layer=partial(nn.LayerNorm, eps=1e-6),  # type: ignore[arg-type]
        )  # fmt: skip
        self.channels = list(channels)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        levels = self.forward_intermediates(pixels, intermediates_only=True)
        assert isinstance(levels, list)
        return levels
