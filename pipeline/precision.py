"""What `precision` settings mean, and where float64 works."""

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device_type: str, precision: str) -> torch.autocast:
    """Around a model's forward pass; fp32 leaves everything as it is."""
    return torch.autocast(device_type, DTYPES[precision], enabled=precision != "fp32")


def with_float64(tensor: Tensor) -> Tensor:
    """The tensor where float64 works: on its own device, or on the CPU, as the GPU of a Mac (mps) has no float64."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor
