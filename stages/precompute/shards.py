"""The work of a Dask worker in stage one: it makes whole shards, with a teacher that is loaded once per process.

    read, decode, replay -> teacher -> seeds, K-means, fusion -> compress, write

The parts overlap: images are read and batches labelled in threads, with bounded queues, and while one shard is written
the teacher works on the next.
"""

import threading
import time
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache.dense import encode_dense, pca_size
from cache.layout import REGION_TOKENS, ArraySpec, array_specs
from cache.store import open_store
from cache.writer import stored_pca, write_shard
from configs.errors import UserError
from configs.schema import Precompute, StageOne
from pipeline.data.dataset import IGNORE, BrokenFile, SegmentationDataset
from pipeline.data.views import draw_views, normalise, padding_colour, teacher_view
from pipeline.pseudo_labels import kmeans_on, pseudo_labels
from pipeline.pseudo_labels.regions import most_groups, region_tokens
from pipeline.teacher.teacher import load_teacher, tokens_along
from stages.common.ahead import ahead
from stages.common.devices import keep_freed_memory, lanes, synchronize, worker_device
from stages.precompute.stopwatch import Stopwatch

PARTS = ("read", "teacher", "cluster", "write")
SHARDS_AT_ONCE = 2  # per worker: one uses the teacher; the other reads its first images, or is written
_BATCHES_AHEAD = 2

_room = threading.BoundedSemaphore(SHARDS_AT_ONCE)
_teachers_turn = threading.Lock()  # one shard at a time uses the teacher; it is written while the next one does
_loading = threading.Lock()


def part_lanes(device: str) -> dict[str, int]:
    """How many threads a worker has for each of PARTS."""
    return dict(zip(PARTS, (lanes(device).readers, 1, 1, 1), strict=True))


@dataclass(frozen=True)
class ShardJob:
    """Everything a worker needs to make one shard; small, because Dask serialises it for every task."""

    settings: str  # the resolved stage-one settings as JSON, with the cache's number of views
    fingerprint: str  # of the cache: weights at the same path may change during the life of a worker
    precompute: Precompute
    data_root: Path
    device: str  # as the user asked
    cache: str
    kmeans: str | None  # that the cache was started with; None: a new cache, or a format without it
    holder: str  # of the cache's lock: a worker may outlive the run that gave it the job
    index: int
    first_view: int
    start: int
    stop: int


@dataclass(frozen=True)
class Done:
    """A shard that is written, and the seconds of each of PARTS."""

    images: int
    views: int
    seconds: dict[str, float]


class Sample(NamedTuple):
    """A view to encode: its place in the arrays, pixels (S, S, 3) uint8 and unannotated tokens (G, G) bool."""

    place: tuple[int, int]
    pixels: np.ndarray
    unannotated: np.ndarray


class Outputs(NamedTuple):
    """The outputs for a batch: the views' positions, and the arrays to store by name, (B, ...) each."""

    places: list[tuple[int, int]]
    arrays: dict[str, np.ndarray]


class Worker:
    """A process's teacher and dataset."""

    def __init__(self, settings: str, precompute: Precompute, data_root: Path, device: str) -> None:
        self.config = StageOne.model_validate_json(settings)
        self.precompute, self.device = precompute, worker_device(device)
        self.lanes = lanes(self.device)
        keep_freed_memory()
        torch.set_num_threads(self.lanes.threads)
        self.teacher = load_teacher(self.config.teacher, self.device, precompute.channels_last, precompute.compile)
        self.dataset = SegmentationDataset(self.config.dataset, data_root, "train")
        self.grid = tokens_along(self.config.views.size, self.teacher.stride, self.config.teacher.model)
        self.groups = most_groups(self.config.pseudo_labels, self.grid)

    def array_specs(self) -> dict[str, ArraySpec]:
        storage = self.config.storage
        size = (self.teacher.width, self.grid, self.groups)
        return array_specs(*size, storage.shard_images, storage.dense_tokens, storage.dense_views)

    def views(self, job: ShardJob, row: int) -> tuple[np.ndarray, list[Sample]]:
        """Geometries (V, 5) and samples of the views that the job makes of an image; BrokenFile if it cannot be read.

        A sample's place is counted from the job's first image and view.
        """
        size = self.config.views.size
        image, seen = self.dataset.training_pair(row)
        views = draw_views(self.config.views, self.dataset.ids[row], seen)[job.first_view :]
        samples = []
        for index, view in enumerate(views):
            shown = teacher_view(view, image, seen, size, padding_colour(self.teacher.mean), self.grid)
            samples.append(Sample((row - job.start, index), *shown))
        return views, samples

    def batch(self, samples: list[Sample]) -> tuple[list[Sample], Tensor]:
        """The samples with their normalised pixels (B, 3, S, S), on the teacher's device."""
        pixels = np.stack([sample.pixels for sample in samples])
        return samples, normalise(pixels, self.teacher.mean, self.teacher.std, self.device)

    def encode(self, batch: tuple[list[Sample], Tensor]) -> tuple[list[Sample], Tensor, Tensor]:
        samples, pixels = batch
        cls_tokens, dense_tokens = self.teacher.encode(pixels)
        synchronize(self.device)
        return samples, cls_tokens, dense_tokens

    def label(self, encoded: tuple[list[Sample], Tensor, Tensor], kmeans: str | None) -> Outputs:
        """Everything that is stored, except dense tokens."""
        samples, cls_tokens, dense_tokens = encoded
        unannotated = np.stack([sample.unannotated for sample in samples])
        clusters, groups = pseudo_labels(dense_tokens, unannotated, self.config.pseudo_labels, kmeans)
        arrays = {
            "cls_tokens": cls_tokens.cpu().numpy(), "kmeans_labels": clusters, "pseudo_labels": groups,
            REGION_TOKENS: region_tokens(dense_tokens, groups, self.groups),
        }  # fmt: skip
        return Outputs([sample.place for sample in samples], arrays)


@lru_cache(maxsize=1)
def _worker(settings: str, precompute: Precompute, data_root: Path, device: str, fingerprint: str) -> Worker:
    return Worker(settings, precompute, data_root, device)


def worker_of(job: ShardJob) -> Worker:
    """Loaded once per process, never sent to it."""
    with _loading:
        return _worker(job.settings, job.precompute, job.data_root, job.device, job.fingerprint)


def describe(job: ShardJob) -> tuple[int, dict[str, ArraySpec], str]:
    """The teacher's width C, the arrays of the cache, and the K-means that suits the worker; no shard is made."""
    worker = worker_of(job)
    return worker.teacher.width, worker.array_specs(), kmeans_on(worker.device)


def text_features(job: ShardJob, names: tuple[tuple[str, ...], ...], templates: str | tuple[str, ...]) -> np.ndarray:
    """(K, C) class features by the worker's teacher; see Teacher.text_features."""
    return np.asarray(worker_of(job).teacher.text_features(names, templates).cpu())


def calibrate(job: ShardJob) -> float:
    """Seconds per view here, measured by running the teacher and labelling on a few views of the job's shard.

    Reading is not included, as it is done ahead. 0 if none of the shard's images can be read and they may be skipped.
    """
    worker = worker_of(job)
    count = job.precompute.batch_size if worker.device != "cpu" else 2
    found = chain.from_iterable(readable(worker, job, range(job.start, job.stop)))
    samples = list(islice(found, count))
    if not samples:
        return 0.0
    with _teachers_turn:
        worker.label(worker.encode(worker.batch(samples[:1])), job.kmeans)  # the first pass allocates
        start = time.perf_counter()
        worker.label(worker.encode(worker.batch(samples)), job.kmeans)
        return (time.perf_counter() - start) / len(samples)


def make_shard(job: ShardJob) -> Done:
    """Computes and writes one whole shard, or the views that it lacks."""
    with _room:
        watch, worker = Stopwatch(*PARTS), worker_of(job)
        arrays, skipped = _compute(worker, job, watch)
        with watch("write"):
            store = open_store(job.cache)
            if store.holder() != job.holder:
                raise UserError(f"{job.cache} is now being written by another precompute: this one stops")
            write_shard(job.cache, job.index, job.first_view, arrays, skipped)
    views = (job.stop - job.start - len(skipped)) * arrays["views"].shape[1]
    return Done(job.stop - job.start, views, watch.seconds)


def _compute(worker: Worker, job: ShardJob, watch: Stopwatch) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The shard's arrays, and the ids of images that could not be read, with the reason."""
    arrays = _empty_arrays(worker, job)
    encoding = worker.config.storage.dense_tokens
    pca = stored_pca(job.cache) if pca_size(encoding) else None
    skipped: dict[str, str] = {}

    def read(row: int) -> tuple[np.ndarray, list[Sample]] | BrokenFile:
        with watch("read"):
            return _read_views(worker, job, row)

    def batch(samples: list[Sample]) -> tuple[list[Sample], Tensor]:
        with watch("read"):
            return worker.batch(samples)

    def label(encoded: tuple[list[Sample], Tensor, Tensor]) -> Outputs:
        with watch("cluster"):
            outputs = worker.label(encoded, job.kmeans)
            if encoding != "none":  # they are large, and must be copied from a GPU
                outputs.arrays.update(encode_dense(encoded[2].cpu().numpy(), encoding, pca))
            return outputs

    def samples() -> Iterator[Sample]:
        rows = range(job.start, job.stop)
        for row, found in zip(rows, ahead(readers, read, rows, 2 * worker.lanes.readers), strict=True):
            if isinstance(found, BrokenFile):
                skipped[worker.dataset.ids[row]] = str(found)
            else:
                arrays["views"][row - job.start], views = found
                yield from views

    def encoded(batches: Iterable[tuple[list[Sample], Tensor]]) -> Generator[tuple[list[Sample], Tensor, Tensor]]:
        with _teachers_turn:
            for ready in batches:
                with watch("teacher"):
                    outputs = worker.encode(ready)
                yield outputs

    with ThreadPoolExecutor(worker.lanes.readers) as readers, ThreadPoolExecutor(1) as labeller:
        batches = ahead(readers, batch, in_batches(samples(), job.precompute.batch_size), _BATCHES_AHEAD)
        with closing(encoded(batches)) as passes:  # releases the teacher, whatever happens
            for outputs in ahead(labeller, label, passes, _BATCHES_AHEAD):
                _store(outputs, arrays)
    return arrays, skipped


def _store(outputs: Outputs, arrays: dict[str, np.ndarray]) -> None:
    for name in arrays.keys() & outputs.arrays.keys():
        for (row, view), value in zip(outputs.places, outputs.arrays[name], strict=True):
            if view < arrays[name].shape[1]:  # of dense tokens, perhaps only the first views are kept
                arrays[name][row, view] = value


def _empty_arrays(worker: Worker, job: ShardJob) -> dict[str, np.ndarray]:
    """Arrays with the values that unreadable images keep: no label, and zeros."""
    arrays = {}
    for name, spec in worker.array_specs().items():
        views = max(0, spec.stored_views(worker.config.views.count) - job.first_view)
        fill = IGNORE if spec.dtype == "uint8" else 0
        arrays[name] = np.full((job.stop - job.start, views, *spec.tail), fill, spec.dtype)
    return arrays


def readable(worker: Worker, job: ShardJob, rows: Iterable[int]) -> Iterator[list[Sample]]:
    """The samples of each image of `rows` that can be read; BrokenFile as `precompute.on_error` says."""
    for row in rows:
        found = _read_views(worker, job, row)
        if not isinstance(found, BrokenFile):
            yield found[1]


def _read_views(worker: Worker, job: ShardJob, row: int) -> tuple[np.ndarray, list[Sample]] | BrokenFile:
    """As `Worker.views`; an image that cannot be read stops everything, or is returned as its error."""
    try:
        return worker.views(job, row)
    except BrokenFile as error:
        if job.precompute.on_error == "stop":
            raise
        return error


def in_batches(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    """Lists of `size` samples; the last may be short."""
    while batch := list(islice(samples, size)):
        yield batch
