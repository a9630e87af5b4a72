"""Stage one: the frozen teacher runs once over the training split; its outputs go to a cache."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import zarr
from dask.distributed import Client
from torch import Tensor

from cache.base import Store
from cache.copies import trusted_manifest
from cache.layout import MANIFEST
from cache.manifest import Manifest, check_settings, fingerprint
from cache.reader import open_cache
from cache.store import absolute, open_store
from cache.writer import create_cache, forget_skipped, list_skipped, pending, stored_pca
from configs.errors import UserError
from configs.load import as_settings, merge
from configs.schema import Config, StageOne
from pipeline.data.dataset import SegmentationDataset
from pipeline.openmp import faiss
from pipeline.teacher.teacher import fingerprint as teacher_fingerprint
from pipeline.teacher.text import read_text_features
from stages.common.caches import CACHES, split_settings
from stages.common.datasets import open_training_split
from stages.common.progress import progress_bar, say
from stages.common.text import class_features
from stages.precompute.pca import fit_dense_pca
from stages.precompute.plan import Timing, plan
from stages.precompute.shards import ShardJob, calibrate, describe, make_shard, part_lanes, text_features
from stages.precompute.workers import for_all, on_a_worker, on_every_worker, worker_addresses, workers


def cache_settings(config: StageOne, dataset: SegmentationDataset) -> dict[str, Any]:
    """The content of the fingerprint: the resolved settings and digests of the teacher's and the dataset's files."""
    files = {"dataset": dataset.digest(), **teacher_fingerprint(config.teacher)}
    if config.dataset.text_features is not None:
        features = read_text_features(Path(config.dataset.text_features), len(config.dataset.channels), None)
        files["text_features"] = hashlib.sha256(features.tobytes()).hexdigest()
    return {**split_settings(config)[0], "files": files}


def precompute(
    config: Config,
    data_root: Path,
    cache: str | None,
    device: str,
    scheduler: str | None = None,
    dry_run: bool = False,
    retry_skipped: bool = False,
) -> str:
    """Make the cache that `config` describes, complete it, or add views to it.

    Args:
        cache: its folder or URL; by default a folder below `caches/`, named after the settings' fingerprint.
        device: for workers on this machine; with a scheduler, `auto`, and each worker chooses.
        scheduler: address of a running Dask scheduler, tcp://...; by default one is started here.
        dry_run: stop after the plan; no cache is written.
        retry_skipped: make the shards again in which images were skipped.

    Returns:
        The cache's folder or URL.
    """
    with progress_bar("reading the dataset"):
        dataset = open_training_split(config.dataset, data_root)
        settings = cache_settings(config.stage_one, dataset)
    name = fingerprint(settings)
    path = cache or str(CACHES / f"{config.dataset.name}-{name[:12]}")
    store = open_store(path)
    if retry_skipped:
        with store.lock():
            say(f"trying {forget_skipped(path)} skipped images again")
    if _is_complete(path, name, config.views.count):
        say(f"{path} is complete for these settings: nothing to do")
    else:
        with nullcontext(lambda: None) if dry_run else store.lock() as check_lock:
            if not _make(config, data_root, dataset, settings, path, device, scheduler, dry_run, check_lock):
                return path
        say(f"cache: {path}")
    skipped = list_skipped(path)
    if skipped:
        first = next(iter(skipped.values()))
        say(
            f"{len(skipped)} images were skipped ({store.show(MANIFEST)} lists them; the first: {first}); "
            "--retry-skipped tries them again"
        )
    return path


def _is_complete(path: str, name: str, views: int) -> bool:
    """Whether nothing is missing or damaged, except possibly the bytes of shards, which training checks."""
    try:
        manifest = open_cache(path).manifest
    except UserError:
        return False
    return manifest.fingerprint == name and manifest.views >= views


def _make(
    config: Config, data_root: Path, dataset: SegmentationDataset, settings: dict[str, Any], path: str, device: str,
    scheduler: str | None, dry_run: bool, check_lock: Callable[[], None],
) -> bool:  # fmt: skip
    """Make what is missing; False for a dry run."""
    store = open_store(path)
    views, kmeans = _begun(store, path, settings, config.views.count)
    base = ShardJob(
        settings=json.dumps(merge(as_settings(config.stage_one), {"views": {"count": views}})),
        fingerprint=fingerprint(settings),
        precompute=config.precompute,
        data_root=data_root.absolute(),
        device=device,
        cache=absolute(path),
        kmeans=kmeans,
        holder=store.holder(),
        index=0, first_view=0, start=0, stop=len(dataset),
    )  # fmt: skip
    most = -(-len(dataset) // config.storage.shard_images)
    with workers(scheduler, device, most) as client:
        manifest, features = _describe(client, base, config, dataset, settings, views)
        base = replace(base, kmeans=manifest.kmeans)  # the same for all workers, whatever their devices
        shards = pending(path, manifest)
        jobs = [
            replace(base, index=index, first_view=first_view, start=start, stop=stop)
            for index, first_view in shards
            for start, stop in [manifest.shard_rows(index)]
        ]
        if jobs:
            with progress_bar("calibrating"):
                speeds = on_every_worker(client, calibrate, jobs[0])
            todo = plan(manifest, shards, speeds, store.free_bytes())
            say(f"teacher: {config.teacher.model}, {config.teacher.pretrained}, {config.teacher.dense} dense tokens")
            say(str(todo))
            todo.check_room(store)
        if dry_run:
            return False
        pca = stored_pca(path) or on_a_worker(client, fit_dense_pca, base)
        create_cache(path, manifest, dataset.ids, features, pca)
        if len(shards) < manifest.shards:
            say(f"{path} has {manifest.shards - len(shards)} of {manifest.shards} shards: continuing")
        if jobs:
            _run(client, jobs, store, check_lock)
    return True


def _begun(store: Store, path: str, settings: dict[str, Any], asked: int) -> tuple[int, str | None]:
    """Target number of views, never fewer than the cache has, and the K-means that it was started with, if known.

    UserError if it was made with other settings.
    """
    try:
        stored = trusted_manifest(store)
    except UserError:  # there is none; or it is lost, which `create_cache` says
        return asked, None
    check_settings(path, stored, settings)
    return max(stored.views, asked), stored.kmeans


class _TextTower:
    """The teacher's text tower on a worker, so that this process loads no model."""

    def __init__(self, client: Client, job: ShardJob) -> None:
        self._client, self._job = client, job

    def text_features(self, names: Sequence[Sequence[str]], templates: str | Sequence[str]) -> Tensor:
        return torch.from_numpy(on_a_worker(self._client, text_features, self._job, names, templates))


def _describe(
    client: Client, job: ShardJob, config: Config, dataset: SegmentationDataset, settings: dict[str, Any], views: int
) -> tuple[Manifest, np.ndarray]:
    """The manifest for `create_cache`, and the class features."""
    with progress_bar("loading the teacher"):
        width, arrays, kmeans = on_a_worker(client, describe, job)
    if job.kmeans not in (None, kmeans):
        say(f"{job.cache} was started with the K-means of {job.kmeans}, and keeps it (the default here is {kmeans})")
    features = class_features(config, lambda: _TextTower(client, job), width)
    packages = (faiss, np, open_clip, torch, zarr)
    # A repair uses these again, as another batch size, for example, may change rounding.
    rounding = config.precompute.model_dump(mode="json", exclude={"on_error"})
    manifest = Manifest.describe(
        settings=settings,
        versions={package.__name__: package.__version__ for package in packages},
        image_ids=dataset.ids,
        views=views,
        shard_images=config.storage.shard_images,
        arrays=arrays,
        kmeans=job.kmeans or kmeans,
        context={**split_settings(config)[1], "precompute": rounding},
    )
    return manifest, features


def _run(client: Client, jobs: list[ShardJob], store: Store, check_lock: Callable[[], None]) -> None:
    timing = Timing(part_lanes(jobs[0].device))
    start = time.monotonic()
    with progress_bar("precompute", sum(job.stop - job.start for job in jobs), "images") as advance:
        for done in for_all(client, make_shard, jobs):
            check_lock()
            timing.add(done.views, done.seconds)
            advance(done.images, str(timing))
    timing.save(store, time.monotonic() - start, len(worker_addresses(client)))
