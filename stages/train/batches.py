"""The input of a training step: views prepared by loader workers, and the teacher's outputs for them.

CLS tokens and pseudo labels of the whole dataset are in memory as they are stored, 2 KiB a view. Region tokens, where
the loss needs them, are read with the view by the loader's workers. (The pictures of a validation read the cache too.)
"""

import os
import time
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cache.layout import REGION_TOKENS
from cache.reader import Cache
from configs.errors import UserError
from configs.schema import Config
from pipeline.data.dataset import SegmentationDataset
from pipeline.data.training import TrainingViews
from pipeline.data.views import normalise
from stages.train.ranks import micro_batch, own_draws


class Batch(NamedTuple):
    """One step's input, on its device."""

    pixels: Tensor  # (B, 3, S, S) float32 with the student's normalisation
    seen: Tensor  # (B, S, S) uint8 seen classes, 255 = unannotated
    cls_tokens: Tensor  # (B, C) float32
    groups: Tensor  # (B, G, G) uint8 pseudo labels, 255 = annotated
    rows: Tensor  # (B,) int64 which images
    region_tokens: Tensor | None  # (B, M, C) int8 directions of the groups' mean dense tokens, zero where there is none


class Teacher(Protocol):
    """The teacher's outputs in a Batch.

    CLS tokens (B, C) float32, pseudo labels (B, G, G) uint8 and, where `loss.local` is on, region tokens (B, M, C) int8
    of a loader's batch, on the device.
    """

    def __call__(self, loaded: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]: ...


class CachedTeacher:
    """Looks the outputs up in memory; region tokens come with the loader's batch.

    Attributes:
        cls_tokens: (N, V, C) float16.
        groups: (N, V, G, G) uint8.
    """

    def __init__(self, cache: Cache, views: int, device: str) -> None:
        self.cls_tokens = torch.from_numpy(cache.load("cls_tokens", views))
        self.groups = torch.from_numpy(cache.load("pseudo_labels", views))
        self._device = device

    def __call__(self, loaded: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        rows, views, regions = loaded["row"], loaded["view"], loaded.get("region_tokens")
        return (
            self.cls_tokens[rows, views].to(self._device).float(),
            self.groups[rows, views].to(self._device),
            None if regions is None else regions.to(self._device, non_blocking=True),
        )


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
            UserError: the cache has no image that could be read, or lacks an array.
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
        # One pass over it is the whole run: workers live as long as that, and fetch two batches each ahead.
        loader = DataLoader(
            samples, micro_batch(schedule), sampler=own_draws(schedule, first),
            num_workers=min(schedule.workers, os.cpu_count() or 1), pin_memory=cuda, worker_init_fn=worker_init,
            multiprocessing_context="spawn" if schedule.workers else None,
            generator=torch.Generator(),  # its own: where a run starts must not show in what the student draws
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
            ready["seen"].to(self._device, non_blocking=True),
            cls_tokens,
            groups,
            ready["row"].to(self._device),
            regions,
        )

    def close(self) -> None:
        """Ends the loader's workers."""
        self._loaded.close()


def _readable(loaded: Iterator[dict[str, Tensor]]) -> Generator[dict[str, Tensor], None, None]:
    """The loader's batches. Workers wrap errors in a traceback, of which only the last line is for the user."""
    try:
        yield from loaded
    except UserError as error:
        raise type(error)(str(error).strip().rpartition(f"{type(error).__name__}: ")[2]) from error
