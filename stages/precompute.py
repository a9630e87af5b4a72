"""Stage one: the frozen teacher runs once over the training split; its outputs go to a cache."""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import open_clip
import torch
import zarr
from dask.distributed import Client, LocalCluster, as_completed

from cache.layout import array_specs
from cache.manifest import Manifest, fingerprint
from cache.writer import create_cache, pending_shards, write_shard
from configs.load import as_settings
from configs.schema import Config, StageOne
from pipeline.data.dataset import SegmentationDataset
from pipeline.data.views import draw_views, normalise, replay, unannotated_tokens
from pipeline.pseudo_labels import pseudo_labels
from pipeline.teacher.clip import FrozenClip, weights_fingerprint
from stages.caches import CACHES
from stages.progress import progress_bar, say


@dataclass(frozen=True)
class ShardJob:
    """All that a worker needs to make one whole shard; small, because Dask serialises it for every task."""

    settings: str  # the resolved stage-one settings as JSON
    data_root: Path
    cache: Path
    index: int
    start: int
    stop: int
    batch_size: int
    device: str
    threads: int


def cache_settings(config: StageOne, dataset: SegmentationDataset) -> dict[str, Any]:
    """What a cache is fingerprinted by: the resolved settings and digests of the teacher's and the dataset's files."""
    listing = json.dumps(dataset.file_sizes()).encode()
    files = {"dataset": hashlib.sha256(listing).hexdigest(), **weights_fingerprint(config.teacher)}
    return {**as_settings(config), "files": files}


def precompute(config: Config, data_root: Path, cache: Path | None, device: str) -> Path:
    """Makes the cache that `config` describes, or completes it, or finds it complete.

    Args:
        cache: the cache's folder; by default one below `caches/`, named after the settings' fingerprint.

    Returns:
        The cache's folder.
    """
    with progress_bar("reading the dataset"):
        dataset = SegmentationDataset(config.dataset, data_root, "train")
        settings = cache_settings(config.stage_one, dataset)
    name = fingerprint(settings)
    path = cache or CACHES / f"{config.dataset.name}-{name[:12]}"
    pending = _prepare(config, dataset, settings, path, device)
    if not pending:
        say(f"{path} is complete for these settings: nothing to do")
        return path
    shards = -(-len(dataset) // config.storage.shard_images)
    if len(pending) < shards:
        say(f"{path} holds {shards - len(pending)} of {shards} shards: continuing")
    _run(config, data_root, path, pending, len(dataset), device)
    say(f"cache: {path}")
    return path


def _prepare(
    config: Config, dataset: SegmentationDataset, settings: dict[str, Any], path: Path, device: str
) -> list[int]:
    """Creates the cache, or opens it to go on with; returns the shards that are still to be made."""
    teacher = FrozenClip(config.teacher, config.views.size, device)
    text_features = teacher.text_features(config.dataset.classes, config.dataset.templates).cpu().numpy()
    shard_images, dense = config.storage.shard_images, config.storage.dense_tokens != "none"
    packages = (faiss, np, open_clip, torch, zarr)
    manifest = Manifest.describe(
        settings=settings,
        versions={package.__name__: package.__version__ for package in packages},
        image_ids=dataset.ids,
        views=config.views.count,
        shard_images=shard_images,
        arrays=array_specs(teacher.width, teacher.grid, shard_images, dense),
        text_features=text_features,
    )
    create_cache(path, manifest, dataset.ids, text_features)
    return pending_shards(path)


def _run(config: Config, data_root: Path, path: Path, pending: list[int], images: int, device: str) -> None:
    cores = os.cpu_count() or 1
    threads = 1 if cores <= 4 else 4
    workers = 1 if device.startswith("cuda") else max(1, min(cores // threads, len(pending)))
    settings = json.dumps(as_settings(config.stage_one))
    size = config.storage.shard_images
    jobs = [
        ShardJob(
            settings, data_root.absolute(), path.absolute(), index, index * size, min((index + 1) * size, images),
            config.precompute.batch_size, device, threads,
        )
        for index in pending
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
            advance(done)


@lru_cache(maxsize=1)
def _worker_teacher(settings: str, device: str) -> FrozenClip:
    """Loaded once per worker process, never sent to it."""
    config = StageOne.model_validate_json(settings)
    return FrozenClip(config.teacher, config.views.size, device)


@lru_cache(maxsize=1)
def _worker_dataset(settings: str, data_root: Path) -> SegmentationDataset:
    return SegmentationDataset(StageOne.model_validate_json(settings).dataset, data_root, "train")


def make_shard(job: ShardJob) -> int:
    """Runs in a Dask worker: computes and writes one whole shard. Returns the number of images."""
    torch.set_num_threads(job.threads)
    faiss.omp_set_num_threads(job.threads)
    config = StageOne.model_validate_json(job.settings)
    teacher = _worker_teacher(job.settings, job.device)
    dataset = _worker_dataset(job.settings, job.data_root)
    views = np.stack([draw_views(config.views, dataset.ids[row]) for row in range(job.start, job.stop)])
    per_image = config.views.count
    cls_tokens, dense_tokens, groups, clusters = [], [], [], []
    pixels, masks = [], []
    last = job.stop - 1, per_image - 1
    for row in range(job.start, job.stop):
        image, seen = dataset.training_pair(row)
        for view in range(per_image):
            geometry = views[row - job.start, view]
            pixels.append(replay(geometry, image, config.views.size))
            masks.append(replay(geometry, seen, config.views.size))
            if len(pixels) < job.batch_size and (row, view) != last:
                continue
            cls_token, dense = teacher.encode(normalise(np.stack(pixels), teacher.mean, teacher.std))
            cls_tokens.append(cls_token.cpu().numpy().astype(np.float16))
            for tokens, mask in zip(dense.cpu().numpy(), masks, strict=True):
                both = pseudo_labels(tokens, unannotated_tokens(mask, teacher.grid), config.pseudo_labels)
                clusters.append(both[0])
                groups.append(both[1])
                if config.storage.dense_tokens != "none":
                    dense_tokens.append(tokens.astype(np.float16))
            pixels, masks = [], []
    images = job.stop - job.start
    arrays = {
        "cls_tokens": np.concatenate(cls_tokens),
        "pseudo_labels": np.stack(groups),
        "kmeans_labels": np.stack(clusters),
        "views": views,
    }
    if dense_tokens:
        arrays["dense_tokens"] = np.stack(dense_tokens)
    per_view = {
        name: a if name == "views" else a.reshape(images, per_image, *a.shape[1:]) for name, a in arrays.items()
    }
    write_shard(job.cache, job.index, per_view)
    return images
