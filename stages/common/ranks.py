"""Several processes, started by torchrun, share the images: `torchrun --nproc-per-node 8 cli.py evaluate ...`."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.errors import UserError, reason
from pipeline.learning.ranks import rank, world_size
from stages.common.progress import console

_T = TypeVar("_T")
SHARE = 32  # images, which one rank takes together
PATIENCE = timedelta(hours=3)  # of the other ranks, while the first one calibrates or writes


class OtherRankFailed(Exception):
    """Another rank could not do its share; its own error says why."""


@contextmanager
def ranks(device: str) -> Iterator[str]:
    """Join the other torchrun processes, if any; yields this process's device.

    Each rank uses the GPU with its local rank; on CPUs, ranks communicate with gloo. Only the first rank prints.

    Raises:
        UserError: they cannot be joined, or the device cannot be used by several processes.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield device
        return
    if device == "mps":
        raise UserError("--device mps is for one process: start it without torchrun, or choose --device cpu")
    backend = "gloo"
    try:
        names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")
        size, own, local, _ = (int(os.environ[name]) for name in names)
        if not 0 <= own < size or local < 0:
            raise ValueError(f"RANK is {own}, LOCAL_RANK {local}")
        if device.startswith("cuda"):
            backend, device = "cpu:gloo,cuda:nccl", f"cuda:{local}"
            torch.cuda.set_device(device)
        dist.init_process_group(backend, timeout=PATIENCE)
    except (KeyError, ValueError, RuntimeError) as error:
        what = f"{error} is not set" if isinstance(error, KeyError) else reason(error)
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} in the environment asks for several processes, but they cannot be "
            f"joined ({what}): start them with torchrun, or `unset WORLD_SIZE` to use one"
        ) from error
    before, console.quiet = console.quiet, console.quiet or not is_main()
    try:
        yield device
    finally:
        console.quiet = before
        dist.destroy_process_group()


def is_main() -> bool:
    return rank() == 0


def everyone_has(value: _T) -> _T:
    """The first rank's value."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def from_everyone(value: _T) -> list[_T]:
    """The values of all ranks, in their order."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def own_share(items: Sequence[_T]) -> Sequence[_T]:
    """The items of this rank: shares of SHARE neighbours, every n-th."""
    return [item for index, item in enumerate(items) if index // SHARE % world_size() == rank()]


def add_up(counts: Tensor, count: Callable[[], object]) -> None:
    """Runs `count`, which adds this rank's share to `counts` (int64); then all ranks hold the sum.

    Raises:
        OtherRankFailed: `count` raised an error on another rank. This rank's own error is passed on.
    """
    failure = None
    try:
        count()
    except Exception as error:  # the other ranks wait for this one's sum
        failure = error
    if world_size() > 1:
        together = torch.cat([counts.flatten(), counts.new_tensor([failure is not None])])
        dist.all_reduce(together)
        if together[-1] and failure is None:
            raise OtherRankFailed
        counts.copy_(together[:-1].view_as(counts))
    if failure is not None:
        raise failure


def take_buffers(module: nn.Module) -> None:
    """The first rank's: the spread, and running statistics of norms, which each rank has of its own images."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)
