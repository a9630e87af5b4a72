"""Training with several processes, started by torchrun: `torchrun --nproc-per-node 8 cli.py train ...`."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from configs.errors import UserError, writing
from configs.schema import Train
from pipeline.learning.ranks import averaged, rank, world_size
from stages.common.progress import say
from stages.common.ranks import from_everyone


def wait_for_all() -> None:
    if world_size() > 1:
        dist.barrier()


def anywhere(true: bool, device: str) -> bool:
    """Whether it is true on any rank, so that all ranks take the same branch."""
    if world_size() == 1:
        return true
    return bool(averaged(torch.tensor(float(true), device=device)) > 0)


def loaded_once(load: Callable[[], np.ndarray]) -> np.ndarray:
    """What `load` returns. Of several ranks, one on each machine loads it; the others map its temporary file.

    Raises:
        UserError: there is no room for the file.
    """
    if world_size() == 1:
        return load()
    local = int(os.environ["LOCAL_RANK"])
    path = Path(tempfile.gettempdir()) / f"clip-zss-{os.getpid()}.npy"
    if local == 0:
        with writing(path):
            np.save(path, load())
    on_own_machine = from_everyone(path)[rank() - local]
    mapped: np.ndarray = np.load(on_own_machine, mmap_mode="c")
    wait_for_all()
    if local == 0:
        path.unlink()  # the ranks keep what they have mapped
    return mapped


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
