"""Training by several processes, as torchrun starts them: `torchrun --nproc-per-node 8 cli.py train ...`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from configs.errors import UserError
from configs.schema import Train
from stages.progress import be_quiet

# A rank waits this long for the others: rank 0 may write a checkpoint to a slow disk, another one open a large cache.
PATIENCE = timedelta(hours=1)


@contextmanager
def ranks(device: str) -> Iterator[str]:
    """Joins the other processes of torchrun, if there are any; yields this one's device.

    Only rank 0 prints. Each rank takes the GPU of its number on its machine; CPUs talk by gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    backend = "gloo"
    if device.startswith("cuda"):
        backend, device = "nccl", f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        if dist.get_rank():
            be_quiet()
        yield device
    finally:
        dist.destroy_process_group()


def images_per_rank(config: Train, world: int) -> int:
    """Of one micro-batch. UserError if the batch cannot be split evenly."""
    parts = world * config.accumulate
    if config.batch_size % parts:
        fitting = [str(count) for count in range(1, config.batch_size + 1) if config.batch_size % count == 0]
        raise UserError(
            f"train.batch_size {config.batch_size} cannot be split into {world} processes x {config.accumulate} "
            f"(train.accumulate): their product must be one of {', '.join(fitting)}"
        )
    return config.batch_size // parts


def same_everywhere(path: str) -> str:
    """Rank 0's value."""
    values = [path]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]
