"""Stage one: the frozen teacher runs once over the training split; its outputs go to a cache."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import open_clip
import torch
import zarr
from dask.distributed import Client, LocalCluster, as_completed

from cache.layout import MANIFEST, SHARDS, ArraySpec, array_specs
from cache.manifest import Manifest, fingerprint
from cache.reader import open_cache
from cache.store import absolute, open_store
from cache.writer import create_cache, list_skipped, pending, write_shard
from configs.errors import UserError
from configs.load import as_settings, merge
from configs.schema import Config, StageOne
from pipeline.data.dataset import IGNORE, BrokenFile, SegmentationDataset
from pipeline.data.views import draw_views, inside, normalise, padding_colour, replay, unannotated_tokens
from pipeline.pseudo_labels import pseudo_labels
from pipeline.teacher.clip import FrozenClip
from pipeline.teacher.load import weights_fingerprint
from pipeline.teacher.text import read_text_features
from stages.caches import CACHES, split_settings
from stages.datasets import open_split
from stages.devices import keep_freed_memory
from stages.progress import progress_bar, say
from stages.text import class_features


@dataclass(frozen=True)
class ShardJob:
    """All that a worker needs to make one whole shard; small, because Dask serialises it for every task."""

    settings: str  # the resolved stage-one settings as JSON, with the cache's number of views
    data_root: Path
    cache: str
    index: int
    first_view: int
    start: int
    stop: int
    batch_size: int
    skip_broken: bool
    device: str
    threads: int


def cache_settings(config: StageOne, dataset: SegmentationDataset) -> dict[str, Any]:
    """What a cache is fingerprinted by: the resolved settings and digests of the teacher's and the dataset's files."""
    files = {"dataset": dataset.digest(), **weights_fingerprint(config.teacher)}
    if config.dataset.text_features is not None:
        features = read_text_features(Path(config.dataset.text_features), len(config.dataset.classes), None)
        files["text_features"] = hashlib.sha256(features.tobytes()).hexdigest()
    return {**split_settings(config)[0], "files": files}


def precompute(config: Config, data_root: Path, cache: str | None, device: str) -> str:
    """Makes the cache that `config` describes, or completes it, or adds views to it, or finds it complete.

    Args:
        cache: its folder or URL; by default a folder below `caches/`, named after the settings' fingerprint.

    Returns:
        The cache's folder or URL.
    """
    with progress_bar("reading the dataset"):
        dataset = open_split(config.dataset, data_root, "train")
        settings = cache_settings(config.stage_one, dataset)
    name = fingerprint(settings)
    path = cache or str(CACHES / f"{config.dataset.name}-{name[:12]}")
    store = open_store(path)
    if _is_complete(path, name, config.views.count):
        say(f"{path} is complete for these settings: nothing to do")
        skipped = list_skipped(path)
    else:
        with store.lock() as check_lock:
            manifest = _prepare(config, dataset, settings, path, device)
            shards = pending(path)
            if len(shards) < manifest.shards:
                say(f"{path} holds {manifest.shards - len(shards)} of {manifest.shards} shards: continuing")
            _run(config, data_root, path, manifest, shards, device, check_lock)
            skipped = list_skipped(path)
        say(f"cache: {path}")
    if skipped:
        first = next(iter(skipped.values()))
        say(
            f"{len(skipped)} images were left out ({store.show(MANIFEST)} lists them; the first: {first}); "
            f"to try them again, delete the records below {store.show(SHARDS)} that name them"
        )
    return path


def _is_complete(path: str, name: str, views: int) -> bool:
    """Nothing is missing or damaged but, perhaps, a shard's bytes, which training checks."""
    try:
        manifest = open_cache(path).manifest
    except UserError:
        return False
    return manifest.fingerprint == name and manifest.views >= views


def _prepare(
    config: Config, dataset: SegmentationDataset, settings: dict[str, Any], path: str, device: str
) -> Manifest:
    """Creates the cache, or opens it to go on with."""
    teacher = FrozenClip(config.teacher, device)
    text_features = class_features(config, lambda: teacher, teacher.width)
    packages = (faiss, np, open_clip, torch, zarr)
    manifest = Manifest.describe(
        settings=settings,
        versions={package.__name__: package.__version__ for package in packages},
        image_ids=dataset.ids,
        views=config.views.count,
        shard_images=config.storage.shard_images,
        arrays=_array_specs(config, teacher),
        # Another batch size may round otherwise: a repair takes this one.
        context={**split_settings(config)[1], "precompute": {"batch_size": config.precompute.batch_size}},
    )
    return create_cache(path, manifest, dataset.ids, text_features)


def _array_specs(config: StageOne, teacher: FrozenClip) -> dict[str, ArraySpec]:
    storage, grid = config.storage, teacher.grid(config.views.size)
    return array_specs(
        teacher.width, grid, storage.shard_images, storage.dense_tokens != "none", storage.dense_views
    )


def _run(
    config: Config, data_root: Path, path: str, manifest: Manifest, shards: list[tuple[int, int]], device: str,
    check_lock: Callable[[], None],
) -> None:  # fmt: skip
    cores = os.cpu_count() or 1
    threads = 1 if cores <= 4 else 4
    workers = 1 if device.startswith("cuda") else max(1, min(cores // threads, len(shards)))
    settings = json.dumps(merge(as_settings(config.stage_one), {"views": {"count": manifest.views}}))
    jobs = [
        ShardJob(
            settings, data_root.absolute(), absolute(path), index, first_view, *manifest.shard_rows(index),
            config.precompute.batch_size, config.precompute.on_error == "skip", device, threads,
        )
        for index, first_view in shards
    ]  # fmt: skip
    total = sum(job.stop - job.start for job in jobs)
    with (
        progress_bar("precompute", total, "images") as advance,
        LocalCluster(
            n_workers=workers, threads_per_worker=1, dashboard_address=None, silence_logs=logging.CRITICAL
        ) as cluster,
        Client(cluster) as client,
    ):
        futures = client.map(make_shard, jobs, pure=False, retries=0)
        for _, done in as_completed(futures, with_results=True):
            check_lock()
            advance(done)


@lru_cache(maxsize=1)
def _worker_teacher(settings: str, device: str) -> FrozenClip:
    """Loaded once per worker process, never sent to it."""
    return FrozenClip(StageOne.model_validate_json(settings).teacher, device)


@lru_cache(maxsize=1)
def _worker_dataset(settings: str, data_root: Path) -> SegmentationDataset:
    return SegmentationDataset(StageOne.model_validate_json(settings).dataset, data_root, "train")


def make_shard(job: ShardJob) -> int:
    """Runs in a Dask worker: computes and writes one whole shard, or the views that it lacks.

    Returns:
        The number of images.
    """
    torch.set_num_threads(job.threads)
    faiss.omp_set_num_threads(job.threads)
    keep_freed_memory()
    config = StageOne.model_validate_json(job.settings)
    teacher = _worker_teacher(job.settings, job.device)
    arrays = {}
    for name, spec in _array_specs(config, teacher).items():
        views = max(0, spec.stored_views(config.views.count) - job.first_view)
        fill = IGNORE if spec.dtype == "uint8" else 0
        arrays[name] = np.full((job.stop - job.start, views, *spec.tail), fill, spec.dtype)
    skipped: dict[str, str] = {}
    samples = _readable_views(job, config, teacher, arrays["views"], skipped)
    while batch := list(islice(samples, job.batch_size)):
        pixels = normalise(np.stack([pixels for _, pixels, _ in batch]), teacher.mean, teacher.std)
        cls_tokens, dense_tokens = teacher.encode(pixels)
        unannotated = np.stack([mask for _, _, mask in batch])
        labels = zip(*pseudo_labels(dense_tokens, unannotated, config.pseudo_labels), strict=True)
        tokens = zip(cls_tokens.cpu().numpy(), dense_tokens.cpu().numpy(), strict=True)
        for (place, _, _), (cls_token, dense), maps in zip(batch, tokens, labels, strict=True):
            arrays["cls_tokens"][place] = cls_token
            arrays["kmeans_labels"][place], arrays["pseudo_labels"][place] = maps
            if "dense_tokens" in arrays and place[1] < arrays["dense_tokens"].shape[1]:
                arrays["dense_tokens"][place] = dense
    write_shard(job.cache, job.index, job.first_view, arrays, skipped)
    return job.stop - job.start


def _readable_views(
    job: ShardJob, config: StageOne, teacher: FrozenClip, views: np.ndarray, skipped: dict[str, str]
) -> Iterator[tuple[tuple[int, int], np.ndarray, np.ndarray]]:
    """Draws the job's views of its images into `views`; (place in the arrays, pixels, unannotated tokens) of each.

    Images that cannot be read go to `skipped`, or stop everything.
    """
    dataset = _worker_dataset(job.settings, job.data_root)
    size, grid = config.views.size, teacher.grid(config.views.size)
    for row in range(job.start, job.stop):
        try:
            image, seen = dataset.training_pair(row)
        except BrokenFile as error:
            if not job.skip_broken:
                raise
            skipped[dataset.ids[row]] = str(error)
            continue
        views[row - job.start] = draw_views(config.views, dataset.ids[row], seen)[job.first_view :]
        for index, view in enumerate(views[row - job.start]):
            pixels = replay(view, image, size, padding_colour(teacher.mean))
            unannotated = unannotated_tokens(replay(view, seen, size), inside(view, size), grid)
            yield (row - job.start, index), pixels, unannotated
