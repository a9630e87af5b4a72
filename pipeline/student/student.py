"""The student: a closed-set segmentation encoder whose last classifier became a projection to CLIP's width."""

from typing import Any

import timm
import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import Student as StudentConfig
from pipeline.student.head import AllMLPHead
from pipeline.student.weights import load_encoder_weights


class Student(nn.Module):
    """Image (B, 3, H, W) -> features R (B, C, H / 4, W / 4), for any H and W.

    Attributes:
        stride: pixels per feature along one side.
        mean, std: the normalisation its images must have.
    """

    stride = 4

    def __init__(self, config: StudentConfig, width: int, load_weights: bool = True) -> None:
        """`width` is C, the teacher's. Without `load_weights` the encoder stays random (a checkpoint follows).

        Raises:
            UserError: unknown encoder, or weights that do not fit it.
        """
        super().__init__()
        pretrained = load_weights and config.weights == "timm"
        try:
            encoder: Any = timm.create_model(config.encoder, features_only=True, pretrained=pretrained)
        except Exception as error:  # timm and the hub each raise their own
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"student.encoder {config.encoder!r} cannot be made by timm: {reason}") from error
        if load_weights and config.weights not in ("timm", "none"):
            load_encoder_weights(encoder, config.weights)
        strides = encoder.feature_info.reduction()
        self._levels = [level for level, stride in enumerate(strides) if stride >= self.stride]
        if not self._levels or strides[self._levels[0]] != self.stride:
            raise UserError(
                f"student.encoder {config.encoder!r} has no features at stride 4 (strides {strides}): choose another"
            )
        self.encoder = encoder.to(memory_format=torch.channels_last)
        self._multiple = strides[-1]
        channels = [encoder.feature_info.channels()[level] for level in self._levels]
        self.head = AllMLPHead(channels, config.channels, width)
        settings = encoder.pretrained_cfg
        self.mean: tuple[float, ...] = tuple(settings["mean"])
        self.std: tuple[float, ...] = tuple(settings["std"])

    def forward(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        multiple = self._multiple
        padded = nn.functional.pad(pixels, (0, -width % multiple, 0, -height % multiple))
        padded = padded.contiguous(memory_format=torch.channels_last)  # halves a training step on a CPU
        levels = self.encoder(padded)
        features: Tensor = self.head([levels[level] for level in self._levels])
        rows, columns = (-(-side // self.stride) for side in (height, width))
        return features[..., :rows, :columns]  # (B, C, ceil(H / 4), ceil(W / 4))

    def parameter_groups(self, lr: float, head_lr_factor: float, weight_decay: float) -> list[dict[str, object]]:
        """AdamW groups: the head learns faster; norms and biases do not decay."""
        groups = []
        for part, factor in ((self.encoder, 1.0), (self.head, head_lr_factor)):
            trained = [p for p in part.parameters() if p.requires_grad]
            matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
            groups.append({"params": matrices, "lr": lr * factor, "weight_decay": weight_decay})
            groups.append({"params": vectors, "lr": lr * factor, "weight_decay": 0.0})
        return groups
