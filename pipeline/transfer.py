"""From the CPU's memory to a device's."""

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`. A GPU fetches it from pinned memory by itself, and nothing waits."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


class Fetch:
    """A tensor on its way to the CPU: what was asked of a GPU afterwards goes on meanwhile."""

    def __init__(self, tensor: Tensor) -> None:
        self._arrived = None
        if tensor.is_cuda:
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._copy = tensor.cpu()

    def wait(self) -> Tensor:
        """Its copy on the CPU, once that is there."""
        if self._arrived:
            self._arrived.synchronize()
        return self._copy
