"""A stage one without a teacher: random arrays of 8 images in shards of 3, 3 and 2."""

import itertools
import os
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.layout import array_specs, record_key, shard_key
from cache.manifest import Manifest
from cache.writer import create_cache, pending, write_shard

SETTINGS = {"teacher": {"name": "ViT-B/16", "dense": "clearclip"}, "pseudo_labels": {"lambda": 0.8, "windows": [7, 3]}}
VIEWS, WIDTH, GRID, GROUPS, CLASSES = 2, 4, 3, 6, 5
MOST_VIEWS = 4  # drawn, so that more views leave the first as they are


class StageOne:
    """The calls that precompute makes, in its order."""

    def __init__(
        self,
        path: Path,
        images: int = 8,
        shard_images: int = 3,
        settings: dict[str, Any] = SETTINGS,
        dense: str = "float16",
        versions: dict[str, str] | None = None,
        views: int = VIEWS,
        dense_views: int | None = None,
        location: str | None = None,
    ) -> None:
        random = np.random.default_rng(0)
        self.path, self.location = path, location or str(path)
        self.image_ids = [f"image {i}" for i in range(images)]
        self.text_features = random.normal(size=(CLASSES, WIDTH)).astype("float32")
        self.specs = array_specs(WIDTH, GRID, GROUPS, shard_images, dense, dense_views)
        self.arrays = {
            name: random.integers(0, 256, (images, MOST_VIEWS, *spec.tail)).astype(spec.dtype)
            for name, spec in self.specs.items()
        }
        self.arrays = {name: array[:, : self.specs[name].stored_views(views)] for name, array in self.arrays.items()}
        self.arrays["kmeans_labels"][:] = 0  # equal to Zarr's fill value, which must be stored like any other
        self.manifest = Manifest.describe(
            settings, versions or {"zarr": "3"}, self.image_ids, views, shard_images, self.specs
        )

    def create(self) -> Manifest:
        return create_cache(self.location, self.manifest, self.image_ids, self.text_features)

    def block(self, index: int, first_view: int = 0) -> dict[str, np.ndarray]:
        start, stop = self.manifest.shard_rows(index)
        return {name: array[start:stop, first_view:] for name, array in self.arrays.items()}

    def write(self, index: int, first_view: int = 0) -> None:
        write_shard(self.location, index, first_view, self.block(index, first_view))

    def run(self) -> Path:
        """All of stage one, or what is left of it."""
        self.create()
        for index, first_view in pending(self.location):
            self.write(index, first_view)
        return self.path

    def tree(self) -> dict[str, bytes]:
        """Every file of the cache with its bytes."""
        return {
            path.relative_to(self.path).as_posix(): path.read_bytes()
            for path in sorted(self.path.rglob("*"))
            if path.is_file()
        }

    def file(self, name: str, index: int, view: int = 0) -> Path:
        return self.path / shard_key(name, index, view, self.specs[name])

    def record(self, index: int) -> Path:
        return self.path / record_key(index)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache is some 60 fsyncs, which are most of its time and matter only when the power is cut."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def stage_one(tmp_path: Path) -> Callable[..., StageOne]:
    """stage_one(directory="cache", **changes) -> StageOne in `tmp_path`."""
    return lambda directory="cache", **changes: StageOne(tmp_path / directory, **changes)


@pytest.fixture
def in_processes() -> Callable[..., list[int]]:
    """in_processes(task, ...) runs the tasks at the same time, each in its own process -> their exit codes."""

    def run(*tasks: Callable[[], object]) -> list[int]:
        processes = [get_context("fork").Process(target=task) for task in tasks]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=60)
        assert all(process.exitcode is not None for process in processes), f"{os.getpid()}: a child hangs"
        return [process.exitcode for process in processes if process.exitcode is not None]

    return run


@pytest.fixture
def killed_after() -> Callable[..., Callable[[], None]]:
    """killed_after(flushes, task): `task`, but its process kills itself in place of the fsync with this number."""

    def killed(flushes: int, task: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            calls = itertools.count()

            def fsync(_: int) -> None:
                if next(calls) == flushes:
                    os.kill(os.getpid(), signal.SIGKILL)

            os.fsync = fsync
            task()

        return run

    return killed
