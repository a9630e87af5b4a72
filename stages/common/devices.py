"""What a process computes on."""

import ctypes
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from distributed import get_worker

from configs.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def choose_device(asked: str) -> str:
    """`auto` is a GPU where there is one; `mps` is the GPU of a Mac.

    Raises:
        UserError: it is none of auto, cpu, cuda, cuda:N and mps, or torch cannot use it.
    """
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?|mps", asked):
        raise UserError(f"--device {asked}: choose auto, cpu, cuda, cuda:N or mps")
    if why := obstacle(asked):
        raise UserError(f"--device {asked} cannot be used here ({why}): choose cpu or auto")
    return asked


def obstacle(device: str) -> str | None:
    """What keeps torch from this device, in its own words; None if nothing does."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0]
    return None


def keep_freed_memory() -> None:
    """Lets glibc keep what torch frees on a CPU, for the next layer.

    By default it returns large buffers to the kernel at each free, and their pages are faulted in again: two fifths of
    SegFormer-B0's time at 512 x 512. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] == "glibc":
        allocator = ctypes.CDLL(None)
        allocator.mallopt(_M_MMAP_THRESHOLD, 2**30)
        allocator.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def choose_gpu(device: str) -> None:
    """A new thread would otherwise start at the first GPU, whichever its tensors are on."""
    if device.startswith("cuda"):
        torch.cuda.set_device(device)


@contextmanager
def computing_threads(count: int) -> Iterator[None]:
    """How many cores a thread that starts in the block computes with."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Lanes(NamedTuple):
    """How many threads a stage-one worker computes and reads with."""

    threads: int
    readers: int


def lanes(device: str) -> Lanes:
    """Depends only on the kind of device and the cores, as the number of threads changes the last bits of sums."""
    cores = os.cpu_count() or 1
    threads = 1 if cores <= 4 else 4
    return Lanes(threads, threads if device == "cpu" else max(2, cores // _gpus(device) - 1))


def local_workers(device: str) -> int:
    """Worker processes for this machine: one per GPU, or one per group of cores."""
    if device == "cpu":
        return max(1, (os.cpu_count() or 1) // lanes(device).threads)
    return _gpus(device) if device == "cuda" else 1


def _gpus(device: str) -> int:
    """The number of GPUs of the device's kind in this machine; a Mac has one."""
    return torch.cuda.device_count() if device.startswith("cuda") else 1


def processes_here() -> int:
    """How many processes torchrun started on this machine; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def worker_device(asked: str) -> str:
    """The device of this Dask worker: those that `precompute` starts itself are numbered, and share out the GPUs.

    Workers of a cluster see their own GPU first, as dask-cuda sees to.
    """
    device = choose_device(asked)
    if device == "cuda" and isinstance(number := get_worker().name, int):
        return f"cuda:{number % torch.cuda.device_count()}"
    return device


def synchronize(device: str) -> None:
    """Wait until the device has finished; on a CPU it already has."""
    if device != "cpu":
        torch.accelerator.synchronize(device)


def device_name(device: str) -> str:
    """The maker's name of a GPU where torch knows it, otherwise `device`."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device
