"""Encoders from timm: Swin, and any model that supports `features_only`."""

from typing import Any

import timm
import torch
from torch import Tensor, nn

from configs.errors import UserError, reason

TOKEN = 16  # pixels that a token of a plain ViT covers


def create(name: str, pretrained: bool, **options: Any) -> Any:
    """timm.create_model, for images of any size if the model supports it.

    Raises:
        UserError: no such model, or its weights cannot be had.
    """
    try:
        try:
            return timm.create_model(name, pretrained=pretrained, dynamic_img_size=True, **options)
        except TypeError as error:
            if "dynamic_img_size" not in str(error):
                raise
            return timm.create_model(name, pretrained=pretrained, **options)
    except OSError as error:  # the hub's
        raise UserError(
            f"student.weights timm: the weights of {name} cannot be downloaded ({reason(error)}): connect once, or set "
            "student.weights to a local file of them, or to none"
        ) from error
    except Exception as error:  # timm's own
        raise UserError(f"student.model timm:{name} cannot be made by timm: {reason(error)}") from error


class Swin(nn.Module):
    """Swin (Liu et al. 2021) with a norm after each level, as segmenters use it.

    Image (B, 3, H, W) -> levels at strides 4, 8, 16, 32; H and W are multiples of 32. Where a level is no whole number
    of windows, timm shifts before it pads and mmsegmentation after, so that its segmenters differ there.
    """

    multiple = 32

    def __init__(self, name: str, pretrained: bool, drop_path: float) -> None:
        super().__init__()
        # Windows are shifted in every level, as in the official code: timm decides that by its own image size.
        self.model = create(name, pretrained, num_classes=0, drop_path_rate=drop_path, always_partition=True)
        self.model.norm = nn.Identity()  # the classifier's; the levels have their own
        self.channels: list[int] = [info["num_chs"] for info in self.model.feature_info]
        self.norms = nn.ModuleList(nn.LayerNorm(count) for count in self.channels)
        settings = self.model.pretrained_cfg
        self.mean: tuple[float, ...] = tuple(settings["mean"])
        self.std: tuple[float, ...] = tuple(settings["std"])

    def forward(self, pixels: Tensor) -> list[Tensor]:
        levels = self.model.forward_intermediates(pixels, intermediates_only=True)
        pairs = zip(self.norms, levels, strict=True)
        return [norm(level.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, level in pairs]


class TimmEncoder(nn.Module):
    """Any timm model with `features_only`: image (B, 3, H, W) -> its levels of stride 4 and more, finest first.

    A plain ViT's last tokens become four levels by a simple feature pyramid (Li et al. 2022, ViTDet); it sees the image
    at a size at which a token covers 16 pixels.

    Attributes:
        multiple: H and W must be multiples of this.
    """

    def __init__(self, name: str, pretrained: bool, drop_path: float) -> None:
        """UserError: no such model, no level of stride 4 or more, or it takes images of one size only."""
        super().__init__()
        self.name = name
        options = {"drop_path_rate": drop_path} if drop_path else {}
        self.model = create(name, pretrained, features_only=True, **options)
        info, settings = self.model.feature_info, self.model.pretrained_cfg
        self.mean: tuple[float, ...] = tuple(settings["mean"])
        self.std: tuple[float, ...] = tuple(settings["std"])
        self._channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        strides, channels = info.reduction(), info.channels()
        self._levels = [level for level, stride in enumerate(strides) if stride >= 4]
        if not self._levels:
            raise UserError(f"student.model timm:{name} has no features with a stride of 4 or more (strides {strides})")
        self._patch = strides[-1] if len(set(strides)) == 1 and len(strides) > 1 else None
        self.channels = [channels[level] for level in self._levels]
        self.pyramid = None
        if self._patch:
            self.pyramid = FeaturePyramid(channels[-1])
            self.channels = self.pyramid.channels
        self.multiple = self._find_multiple(name, 2 * TOKEN if self._patch else max(strides), settings["input_size"][1])

    def forward(self, pixels: Tensor) -> list[Tensor]:
        if self._patch and self._patch != TOKEN:
            size = [side * self._patch // TOKEN for side in pixels.shape[-2:]]
            pixels = nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)
        levels = self.model(pixels)
        if self._channels_last:
            levels = [level.permute(0, 3, 1, 2) for level in levels]
        return self.pyramid(levels[-1]) if self.pyramid else [levels[level] for level in self._levels]

    @torch.no_grad()
    def _find_multiple(self, name: str, stride: int, native: int) -> int:
        """The stride of the coarsest level, or the native size where windows of a fixed count want that."""
        training = self.training
        for multiple in (stride, native):
            try:
                self.eval()(torch.zeros(1, 3, multiple, 2 * multiple))
                self.train(training)
                return multiple
            except Exception as error:  # assertions and shape errors: each model has its own
                refusal = error
        raise UserError(
            f"student.model timm:{name} does not accept images of every size ({reason(refusal)}): choose another"
        )


class FeaturePyramid(nn.Module):
    """ViTDet's simple feature pyramid: (B, C, h, w) at stride 16 -> levels at strides 4, 8, 16, 32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half, quarter = channels // 2, channels // 4
        self.channels = [quarter, half, channels, channels]
        self.to_4 = nn.Sequential(
            nn.ConvTranspose2d(channels, half, 2, 2), nn.GroupNorm(1, half), nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, 2),
        )  # fmt: skip
        self.to_8 = nn.ConvTranspose2d(channels, half, 2, 2)
        self.to_32 = nn.MaxPool2d(2, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.to_4(x), self.to_8(x), x, self.to_32(x)]
