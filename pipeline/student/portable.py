"""A student as one function of an image and text features, in a form that torch.export and ONNX take."""

import copy
import math

import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from pipeline.student.student import Student


class Portable(nn.Module):
    """(B, H, W, 3) uint8 RGB and text features (K, C) -> logits (B, K, H, W), float32, for any H and W.

    Normalisation and padding are part of it.

    Attributes:
        multiple: the student pads images to multiples of this.
    """

    def __init__(self, student: Student, dtype: torch.dtype = torch.float32) -> None:
        """A copy of the student in eval mode; `dtype` of its weights and sums."""
        super().__init__()
        self.multiple = math.lcm(student.encoder.multiple, student.stride)
        self.student = copy.deepcopy(student).cpu().eval()
        _pad_as_constants(self.student, self.multiple)
        self.student.to(dtype)
        self.dtype = dtype
        self.mean: Tensor
        self.std: Tensor
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(student, name)).view(3, 1, 1))

    def forward(self, image: Tensor, text_features: Tensor) -> Tensor:
        pixels = (image.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        height, width = image.shape[1:3]
        # Written so that torch.export can tell that the padded sides are multiples.
        below, right = ((side + self.multiple - 1) // self.multiple * self.multiple - side for side in (height, width))
        padded = nn.functional.pad(pixels, (0, right, 0, below))
        logits = self.student.classify(padded.to(self.dtype), text_features.to(self.dtype)).float()
        stride = self.student.stride
        for axis, side in ((2, height), (3, width)):  # repeats the last logit over the padding; `Student` crops it
            places = torch.arange(logits.shape[axis]).clamp(max=(side + stride - 1) // stride - 1)
            logits = logits.index_select(axis, places)
        full = nn.functional.interpolate(logits, scale_factor=stride, mode="bilinear")
        return full.index_select(2, torch.arange(height)).index_select(3, torch.arange(width))


def _pad_as_constants(student: Student, multiple: int) -> None:
    """Replace TensorFlow's `same` padding, which a graph would compute from the size, by constants.

    It is the same for all sizes that are multiples of all strides.
    """
    sizes: dict[nn.Module, tuple[int, ...]] = {}

    def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        sizes[module] = tuple(arguments[0].shape[-2:])

    found = [(parent, name, module) for parent in student.modules() for name, module in parent.named_children()
             if isinstance(module, Conv2dSame)]  # fmt: skip
    hooks = [module.register_forward_pre_hook(note) for _, _, module in found]
    with torch.no_grad():
        student(torch.zeros(1, 3, multiple, multiple))
    for hook in hooks:
        hook.remove()
    for parent, name, module in found:
        padding: list[int] = []
        for side, kernel, stride, dilation in zip(
            sizes[module], module.kernel_size, module.stride, module.dilation, strict=True
        ):
            total = max((-(-side // stride) - 1) * stride + (kernel - 1) * dilation + 1 - side, 0)
            padding = [total // 2, total - total // 2, *padding]  # the last dimension first
        plain = nn.Conv2d(
            module.in_channels, module.out_channels, module.kernel_size, module.stride,  # type: ignore[arg-type]
            dilation=module.dilation, groups=module.groups, bias=module.bias is not None,  # type: ignore[arg-type]
        )  # fmt: skip
        plain.load_state_dict(module.state_dict())
        setattr(parent, name, nn.Sequential(nn.ConstantPad2d(tuple(padding), 0.0), plain))  # type: ignore[arg-type]
