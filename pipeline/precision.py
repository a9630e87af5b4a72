"""What `precision` settings mean."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device_type: str, precision: str) -> torch.autocast:
    """Around a model's forward pass; fp32 leaves everything as it is."""
    return torch.autocast(device_type, DTYPES[precision], enabled=precision != "fp32")
