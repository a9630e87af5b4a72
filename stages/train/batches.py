"""The input of a training step: views prepared by loader workers, and the teacher's outputs for them.

CLS tokens and pseudo labels of the whole dataset are kept in memory as stored, 2 KiB per view, once for all ranks of a
machine. Region tokens, if the loss needs them, are read by the loader's workers, together with the view.
"""

import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cache.layout import REGION_TOKENS
from cache.reader import Cache
from configs.errors import UserError, reason
from configs.schema import Config
from pipeline.data.dataset import SegmentationDataset
from pipeline.data.training import TrainingViews
from pipeline.data.views import normalise
from pipeline.learning.ranks import world_size
from pipeline.transfer import sent
from stages.train.ranks import loaded_once, micro_batch, own_draws

SHARED = Path("/dev/shm")  # on Linux, workers pass their batches on in this shared memory
AHEAD = 2  # batches that a worker prepares


class CannotLoad(UserError):
    """The next batch cannot be loaded; the steps before it are complete."""


class Batch(NamedTuple):
    """One step's input, on its device."""

    pixels: Tensor  # (B, 3, S, S) float32 with the student's normalisation
    seen: Tensor  # (B, S, S) uint8 seen classes, 255 = unannotated
    cls_tokens: Tensor  # (B, C) float32
    groups: Tensor  # (B, G, G) uint8 pseudo labels, 255 = annotated
    rows: Tensor  # (B,) int64 which images
    region_tokens: Tensor | None  # (B, M, C) int8 directions of the groups' mean dense tokens, zero where there is none
    on_cpu: tuple[Tensor, Tensor]  # `seen` and `groups` in the CPU's memory


class Teacher(Protocol):
    """The teacher's outputs in a Batch.

    CLS tokens (B, C) float32 on the device, pseudo labels (B, G, G) uint8 on the CPU and, where `loss.local` is on,
    region tokens (B, M, C) int8 on either, of a loader's batch.
    """

    def __call__(self, loaded: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]: ...


class CachedTeacher:
    """Looks the outputs up in memory; region tokens come with the loader's batch.

    Attributes:
        cls_tokens: (N, V, C) float16.
        groups: (N, V, G, G) uint8.
    """

    def __init__(self, cache: Cache, views: int, device: str) -> None:
        arrays = (loaded_once(partial(cache.load, name, views)) for name in ("cls_tokens", "pseudo_labels"))
        self.cls_tokens, self.groups = map(torch.from_numpy, arrays)
        self._device = device

    def __call__(self, loaded: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        rows, views, regions = loaded["row"], loaded["view"], loaded.get("region_tokens")
        return sent(self.cls_tokens[rows, views], self._device).float(), self.groups[rows, views], regions


class Batches:
    """A rank's batches in order from iteration `first` on, one list of micro-batches per iteration; iterate only once.

    Attributes:
        teacher: cached, or live, as `train.teacher` says.
        asked: when (`time.perf_counter`) the step asked for its batch.
        waited: seconds of the step until the loader had it.
    """

    def __init__(
        self, config: Config, cache: Cache, dataset: SegmentationDataset, mean: tuple[float, ...],
        std: tuple[float, ...], device: str, first: int = 0, worker_init: Callable[[int], None] | None = None,
    ) -> None:  # fmt: skip
        """`mean` and `std` are the student's; `worker_init` runs at the start of every loader worker.

        Raises:
            UserError: the cache has no image that could be read or lacks an array, or shared memory is too small.
        """
        if not len(cache.kept_rows):
            raise UserError(f"cache {cache.location} has no readable images: fix the image files and precompute again")
        self.asked = self.waited = 0.0
        self._mean, self._std, self._device = mean, std, device
        live = None
        if config.train.teacher != "cached":
            from stages.train.online import LiveTeacher  # and with it open_clip

            self.teacher: Teacher = LiveTeacher(config, cache, device)
            live = self.teacher.live
        schedule, count = config.train, config.views.count  # the cache may hold more views
        of_view = cache.reader(REGION_TOKENS) if config.loss.local and live is None else None
        samples = TrainingViews(
            dataset, cache.kept_rows, cache.load("views", count), config.views.size,
            schedule.iterations * schedule.batch_size, schedule.seed, mean, live, of_view,
        )  # fmt: skip
        cuda = device.startswith("cuda")
        # One pass over the loader is the whole run, so its workers live as long as the run.
        size, draws, count_workers = micro_batch(schedule), own_draws(schedule, first), loader_workers(schedule.workers)
        tokens = math.prod(cache.manifest.arrays[REGION_TOKENS].tail) if of_view else 0
        batch = size * (config.views.size**2 * (7 if live else 4) + tokens)  # RGB and a mask, and RGB for the teacher
        if lack := lack_of_shared_memory(batch, count_workers * world_size()):
            raise UserError(lack)
        loader = DataLoader(
            samples, size, sampler=draws, num_workers=count_workers, prefetch_factor=AHEAD if count_workers else None,
            pin_memory=cuda, worker_init_fn=worker_init, multiprocessing_context="spawn" if count_workers else None,
            generator=torch.Generator(),  # its own: a resumed run must draw the same random numbers
        )  # fmt: skip
        self._loaded, self._accumulate = _readable(iter(loader)), schedule.accumulate
        if live is None:  # while the workers start
            self.teacher = CachedTeacher(cache, count, device)

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            self.asked, self.waited, parts = time.perf_counter(), 0.0, []
            for _ in range(self._accumulate):
                asked = time.perf_counter()
                ready = next(self._loaded, None)
                self.waited += time.perf_counter() - asked
                if ready is None:
                    return
                parts.append(self._on_device(ready))
            yield parts

    def _on_device(self, ready: dict[str, Tensor]) -> Batch:
        cls_tokens, groups, regions = self.teacher(ready)
        return Batch(
            normalise(ready["pixels"], self._mean, self._std, self._device),
            sent(ready["seen"], self._device),
            cls_tokens,
            sent(groups, self._device),
            sent(ready["row"], self._device),
            None if regions is None else sent(regions, self._device),
            (ready["seen"], groups),
        )

    def close(self) -> None:
        """Ends the loader's workers."""
        self._loaded.close()


def loader_workers(asked: int) -> int:
    return min(asked, os.cpu_count() or 1)


def lack_of_shared_memory(batch: int, count: int) -> str | None:
    """Why shared memory is too small for `count` workers and batches of `batch` bytes; None if it is large enough."""
    need = batch * (AHEAD * count + 1) if count else 0
    if not SHARED.is_dir() or need <= (free := shutil.disk_usage(SHARED).free):
        return None
    return (
        f"{SHARED} has {free / 2**20:,.0f} MiB free, but {count} train.workers need {need / 2**20:,.0f} MiB: start the "
        "container with more (docker run --shm-size 8g), or lower train.workers; 0 needs none"
    )


def _readable(loaded: Any) -> Generator[dict[str, Tensor], None, None]:
    """The loader's batches. CannotLoad if a worker raises an error or is killed.

    Torch re-raises a worker's error with its traceback as the message; only the last line is kept.
    """
    if sys.platform != "win32" and hasattr(loaded, "_workers"):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise in the middle of a step
    try:
        yield from loaded
    except UserError as error:
        raise CannotLoad(str(error).strip().rpartition(f"{type(error).__name__}: ")[2]) from error
    except (RuntimeError, OSError, MemoryError) as error:
        if not hasattr(loaded, "_workers"):
            raise
        ends = {-(worker.exitcode or 0) for worker in loaded._workers}
        names = sorted(signal.Signals(end).name for end in ends if end in set(signal.Signals))
        why = f"was killed by {', '.join(names)}" if names else f"failed ({_last_line(error)})"
        raise CannotLoad(
            f"a loader worker {why}; memory may be short: start the container with more shared memory (docker run "
            "--shm-size 8g), lower train.workers, or set train.workers=0 to load images in the training process"
        ) from error
    finally:
        for worker in getattr(loaded, "_workers", ()):  # they outlive a SIGTERM, see outlive_signals
            worker.kill()


def _last_line(error: Exception) -> str:
    return reason(RuntimeError(str(error).strip().rpartition("\n")[2]))
