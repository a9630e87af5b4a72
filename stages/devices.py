"""What a process computes on."""

import ctypes
import platform

import torch

from configs.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def choose_device(asked: str) -> str:
    """`auto` is a GPU where there is one."""
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=asked)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {asked} cannot be used here: choose cpu or auto") from error
    return asked


def keep_freed_memory() -> None:
    """Lets glibc keep what torch frees on a CPU, for the next layer.

    By default buffers of megabytes go back to the kernel at each free and their pages are faulted in anew: two fifths
    of SegFormer-B0's time at 512 x 512. Other C libraries do as they do.
    """
    if platform.libc_ver()[0] == "glibc":
        allocator = ctypes.CDLL(None)
        allocator.mallopt(_M_MMAP_THRESHOLD, 2**30)
        allocator.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
