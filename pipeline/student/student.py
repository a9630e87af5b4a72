"""The student: a segmentation model with its final classifier replaced by a projection to CLIP's width."""

import math
from typing import Any

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import Student as StudentConfig
from pipeline.learning.ranks import several_gpus
from pipeline.student.families import family_of
from pipeline.student.heads import FCNHead, UPerHead
from pipeline.student.weights import load_encoder, load_head, load_student, run_weights

AUXILIARY_CHANNELS, AUXILIARY_LEVEL, AUXILIARY_STRIDE = 256, 2, 16
# Parameters that say where something is; like norms and biases they do not decay.
POSITIONS = ("pos_embed", "position", "rel_pos", "attention_biases", "cls_token", "reg_token")


def is_synchronised(batch_norm: str) -> bool:
    """Whether `student.batch_norm` means statistics over all processes here."""
    return batch_norm == "sync" or (batch_norm == "auto" and several_gpus())


class Student(nn.Module):
    """Image (B, 3, H, W) -> features R (B, C, ceil(H / s), ceil(W / s)), for any H and W.

    Attributes:
        stride: s, pixels per feature along one side: 4, or 8 for SegNeXt.
        mean, std: the normalisation its images must have.
        head_lr_factor: the family's.
        spread: (C, C) covariance of R on training images, scaled; zero until a student is calibrated
            (pipeline/gamma.py). It is not trained.
    """

    def __init__(self, config: StudentConfig, width: int, load_weights: bool = True) -> None:
        """`width` is C, the teacher's. Without `load_weights` all stays random (a checkpoint follows).

        Raises:
            UserError: unknown model, or weights that do not fit it.
        """
        super().__init__()
        family = family_of(config.model)
        download = load_weights and config.weights == "timm"
        if download and not family.timm_name:
            raise UserError(
                f"student.weights timm: timm has no weights for {config.model}; give an ImageNet weights file, or none"
            )
        drop_path = family.drop_path if config.drop_path is None else config.drop_path
        encoder = family.encoder(download, drop_path)
        for parameter in encoder.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.encoder: Any = encoder
        self.head: Any = family.head(encoder.channels, config.channels or family.channels, width)
        self.auxiliary_head = None
        if config.auxiliary:
            if family.head is not UPerHead:
                raise UserError(f"student.auxiliary is for Swin and its UPerNet; {config.model} has no auxiliary head")
            self.auxiliary_head = FCNHead(encoder.channels[AUXILIARY_LEVEL], AUXILIARY_CHANNELS, width)
        self.spread: Tensor
        self.register_buffer("spread", torch.zeros(width, width))
        if load_weights and config.weights not in ("timm", "none"):
            if run := run_weights(config.weights):
                load_student(self, run, config.weights)
            else:
                load_encoder(encoder, config.weights)
                load_head(self.head, config.weights, "decode_head")
                if self.auxiliary_head:
                    load_head(self.auxiliary_head, config.weights, "auxiliary_head")
        if is_synchronised(config.batch_norm):
            convert_sync_batchnorm(self)  # type: ignore[no-untyped-call]  # timm's knows its own norms, which hold an activation
        self.stride: int = family.head.stride
        self.head_lr_factor = family.head_lr_factor
        self.mean: tuple[float, ...] = encoder.mean
        self.std: tuple[float, ...] = encoder.std

    def recompute_blocks(self) -> None:
        """Keeps only what goes into the encoder's blocks for the backward pass, and computes them again there.

        Raises:
            UserError: the encoder is timm's, which does not know how.
        """
        encoder = getattr(self.encoder, "model", self.encoder)
        try:
            encoder.set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            raise UserError("train.checkpointing: timm does not offer it for this student.model: unset it") from error

    def forward(self, pixels: Tensor) -> Tensor:
        return self._crop(self.head.project(self._decode(pixels)[0]), pixels)

    def with_auxiliary(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """R, and the auxiliary head's features (B, C, h, w) at stride 16 if it exists."""
        hidden, levels = self._decode(pixels)
        auxiliary = None
        if self.auxiliary_head:
            auxiliary = self._crop(self.auxiliary_head(levels[AUXILIARY_LEVEL]), pixels, AUXILIARY_STRIDE)
        return self._crop(self.head.project(hidden), pixels), auxiliary

    def classify(self, pixels: Tensor, text_features: Tensor) -> Tensor:
        """Logits R . T - sqrt(T' spread T) (B, K, h, w) for text features (K, C).

        The projection to R and the product with T are merged into one linear layer with K outputs, so this is as fast
        as the original classifier.
        """
        last = self.head.project
        deviation = ((text_features @ self.spread) * text_features).sum(dim=1).clamp(min=0).sqrt()
        weight, bias = text_features @ last.weight[:, :, 0, 0], text_features @ last.bias - deviation
        return self._crop(nn.functional.conv2d(self._decode(pixels)[0], weight[:, :, None, None], bias), pixels)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.setdefault(f"{prefix}spread", self.spread)  # students of version 0.2.0 have none
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _decode(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The input of the head's last layer, including padding, and the encoder's levels."""
        height, width = pixels.shape[-2:]
        multiple = math.lcm(self.encoder.multiple, self.stride)
        padded = nn.functional.pad(pixels, (0, -width % multiple, 0, -height % multiple))
        levels = self.encoder(padded.contiguous(memory_format=torch.channels_last))  # halves a CPU's training step
        return self.head.decode(levels, tuple(side // self.stride for side in padded.shape[-2:])), levels

    def _crop(self, features: Tensor, pixels: Tensor, stride: int | None = None) -> Tensor:
        """Crop features to the image, without padding."""
        rows, columns = (-(-side // (stride or self.stride)) for side in pixels.shape[-2:])
        return features[..., :rows, :columns]

    def parameter_groups(self, lr: float, head_lr_factor: float, weight_decay: float) -> list[dict[str, object]]:
        """AdamW groups: the heads at their own rate; norms, biases and positions do not decay."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                rate = lr if name.startswith("encoder.") else lr * head_lr_factor
                still = parameter.ndim <= 1 or any(word in name for word in POSITIONS)
                groups.setdefault((rate, 0.0 if still else weight_decay), []).append(parameter)
        return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]
