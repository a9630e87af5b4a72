"""What `precision` settings mean, and where float64 works."""

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def best_precision(device_type: str) -> str:
    """What `auto` means: bf16 on a GPU that has it, fp16 on other NVIDIA GPUs, elsewhere fp32."""
    if device_type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def precision_on(device_type: str, asked: str) -> str:
    """`asked`, or what `auto` means on this kind of device."""
    return best_precision(device_type) if asked == "auto" else asked


def autocast(device_type: str, precision: str) -> torch.autocast:
    """Around a model's forward pass; fp32 leaves everything as it is."""
    precision = precision_on(device_type, precision)
    return torch.autocast(device_type, DTYPES[precision], enabled=precision != "fp32")


def with_float64(tensor: Tensor) -> Tensor:
    """The tensor where float64 works: on its own device, or on the CPU, as the GPU of a Mac (mps) has no float64."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor
