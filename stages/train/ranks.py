"""Training with several processes, started by torchrun: `torchrun --nproc-per-node 8 cli.py train ...`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from configs.errors import UserError, reason
from configs.schema import Train
from pipeline.learning.ranks import averaged, rank, world_size
from stages.common.progress import console, say

PATIENCE = timedelta(hours=3)  # of the other ranks, while the first one validates


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
        raise UserError("--device mps is for one process: run train without torchrun, or choose --device cpu")
    backend = "gloo"
    try:
        names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")
        size, own, local, _ = (int(os.environ[name]) for name in names)
        if not 0 <= own < size or local < 0:
            raise ValueError(f"RANK is {own}, LOCAL_RANK {local}")
        if device.startswith("cuda"):
            backend, device = "nccl", f"cuda:{local}"
            torch.cuda.set_device(device)
        dist.init_process_group(backend, timeout=PATIENCE)
    except (KeyError, ValueError, RuntimeError) as error:
        what = f"{error} is not set" if isinstance(error, KeyError) else reason(error)
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} in the environment asks for several processes, but they cannot be "
            f"joined ({what}): start them with torchrun, or `unset WORLD_SIZE` to train in one"
        ) from error
    console.quiet = not is_main()
    try:
        yield device
    finally:
        dist.destroy_process_group()


def is_main() -> bool:
    return rank() == 0


def wait_for_all() -> None:
    if world_size() > 1:
        dist.barrier()


def everyone_has(text: str) -> str:
    """The first rank's value."""
    texts = [text]
    if world_size() > 1:
        dist.broadcast_object_list(texts)
    return texts[0]


def anywhere(true: bool, device: str) -> bool:
    """Whether it is true on any rank, so that all ranks take the same branch."""
    return bool(averaged(torch.tensor(float(true), device=device)) > 0)


def micro_batch(schedule: Train) -> int:
    """Images per rank and micro-batch.

    Raises:
        UserError: the batch cannot be split evenly.
    """
    parts = world_size() * schedule.accumulate
    if schedule.batch_size % parts:
        counts = range(1, schedule.batch_size + 1)
        fitting = ", ".join(str(count) for count in counts if schedule.batch_size % count == 0)
        raise UserError(
            f"train.batch_size {schedule.batch_size} cannot be split among {world_size()} processes x train.accumulate "
            f"{schedule.accumulate}: their product must be one of {fitting}"
        )
    together = schedule.batch_size // schedule.accumulate
    if schedule.accumulate > 1:
        say(
            f"train.accumulate {schedule.accumulate}: InfoNCE's negatives, centroids, the counts in NEL and "
            f"cross-entropy, and batch norm see {together} images at a time; the result is not that of a batch of "
            f"{schedule.batch_size}"
        )
    return together // world_size()


def own_draws(schedule: Train, first: int) -> list[int]:
    """The samples that this rank draws, in order, from iteration `first` on: its share of every micro-batch."""
    size = micro_batch(schedule)
    draws = torch.arange(first * schedule.batch_size, schedule.iterations * schedule.batch_size)
    return draws.view(-1, world_size(), size)[:, rank()].flatten().tolist()
