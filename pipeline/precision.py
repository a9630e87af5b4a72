"""What `precision` settings mean, and where float64 is."""

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device_type: str, precision: str) -> torch.autocast:
    """Around a model's forward pass; fp32 leaves everything as it is."""
    return torch.autocast(device_type, DTYPES[precision], enabled=precision != "fp32")


def with_float64(tensor: Tensor) -> Tensor:
    """The tensor where float64 can be computed: on its device, or, as a Mac's GPU has none, on the CPU."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor
