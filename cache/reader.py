"""Reading a cache. What is damaged or missing is refused, with the cure; it never reads as zeros."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import LocalStore

from cache.files import read_json, sha256, to_json
from cache.layout import TEXT_FEATURES, arrays_path, image_ids_path, record_path, shard_path
from cache.manifest import ArrayDigest, Manifest
from cache.record import ShardRecord, load_record
from configs.errors import UserError

_RESTORE = "run precompute with the same settings again, it restores this file"


class Cache:
    """A complete cache, from `open_cache`. Small enough to be sent to loader workers: image arrays stay on disk.

    Attributes:
        image_ids: N ids; row i of every array belongs to image i.
        kept_rows: the rows, ascending, that hold something: images that could not be read were left out.
        text_features: (K, C) float32, unit length.
    """

    def __init__(self, path: Path, manifest: Manifest, records: list[ShardRecord]) -> None:
        self.path = path
        self.manifest = manifest
        self.image_ids = _read_image_ids(path, manifest)
        skipped = {image_id for record in records for image_id in record.skipped}
        self.kept_rows = np.array([i for i, name in enumerate(self.image_ids) if name not in skipped], np.int64)
        self._records = records
        self._arrays = {name: _open_array(path, name) for name in manifest.arrays}
        for name, spec in manifest.arrays.items():
            shape = (manifest.images, manifest.views, *spec.tail)
            if (self._arrays[name].shape, str(self._arrays[name].dtype)) != (shape, spec.dtype):
                raise UserError(f"{arrays_path(path) / name / 'zarr.json'} does not fit the manifest: {_RESTORE}")
        self.text_features = _read_text_features(path, manifest)

    def load(self, name: str) -> np.ndarray:
        """The whole array `name`, (N, V, *tail), checked against the completion records.

        Raises:
            UserError: there is no such array, or a shard is missing or damaged.
        """
        self._require(name)
        array = self._arrays[name]
        whole = np.empty(array.shape, array.dtype)
        for index in range(self.manifest.shards):
            start, stop = self.manifest.shard_rows(index)
            whole[start:stop] = self.load_shard(name, index)
        return whole

    def load_shard(self, name: str, index: int) -> np.ndarray:
        """Shard `index` of array `name`, (rows of the shard, V, *tail); checked, and errors, as in `load`."""
        start, stop = self.manifest.shard_rows(index)
        block = self._read_rows(name, index, slice(start, stop))
        if ArrayDigest.of(block) != self._records[index].arrays[name]:
            raise self._damaged(name, index)
        return block

    def read(self, name: str, row: int) -> np.ndarray:
        """One image of array `name`, (V, *tail); IndexError if `row` is not in [0, N).

        Checked by the checksums inside the shard, as hashing all of it for one image would cost too much.
        """
        if not 0 <= row < self.manifest.images:
            raise IndexError(f"row {row} of {self.manifest.images}")
        return self._read_rows(name, row // self.manifest.shard_images, row)

    def _read_rows(self, name: str, index: int, rows: slice | int) -> np.ndarray:
        """Rows of shard `index`."""
        self._require(name)
        if not shard_path(self.path, name, index, self.manifest.arrays[name]).is_file():
            raise self._damaged(name, index)  # Zarr would make up zeros
        with _refusing(self._damaged(name, index)):
            return np.asarray(self._arrays[name][rows])

    def _require(self, name: str) -> None:
        if name not in self.manifest.arrays:
            held = ", ".join(sorted(self.manifest.arrays))
            raise UserError(f"{self.path} holds no {name} (it holds {held}): run precompute with a setting to store it")

    def _damaged(self, name: str, index: int) -> UserError:
        file = shard_path(self.path, name, index, self.manifest.arrays[name])
        record = record_path(self.path, index)
        return UserError(
            f"{file} is missing or does not match its completion record: "
            f"delete {record} and run precompute again, it recomputes only this shard"
        )


def open_cache(path: Path) -> Cache:
    """The cache at `path`.

    Raises:
        UserError: there is none, it is not complete, or a file other than a shard is damaged.
    """
    manifest = Manifest.load(path)
    missing = [index for index in range(manifest.shards) if not record_path(path, index).exists()]
    if missing:
        done = manifest.shards - len(missing)
        raise UserError(
            f"{path} is incomplete, {done} of {manifest.shards} shards are done: "
            "run precompute with the same settings again, it continues there"
        )
    return Cache(path, manifest, [load_record(path, manifest, index) for index in range(manifest.shards)])


def find_caches(root: Path) -> list[Path]:
    """Complete caches at or below `root`, the one finished last first; broken and incomplete ones are left out."""
    found: list[tuple[float, Path]] = []
    for manifest in root.rglob("manifest.json"):
        try:
            cache = open_cache(manifest.parent)
        except UserError:
            continue
        times = [record_path(cache.path, index).stat().st_mtime for index in range(cache.manifest.shards)]
        found.append((max(times, default=0.0), cache.path))
    return [path for _, path in sorted(found, reverse=True)]


def _read_image_ids(path: Path, manifest: Manifest) -> list[str]:
    file = image_ids_path(path)
    image_ids = read_json(file, _RESTORE)
    if sha256(to_json(image_ids)) != manifest.image_ids_sha256:
        raise UserError(f"{file} does not match the manifest: {_RESTORE}")
    return list(image_ids)


def _open_array(path: Path, name: str) -> zarr.Array[Any]:
    file = arrays_path(path) / name / "zarr.json"
    with _refusing(UserError(f"{file} is missing or damaged: {_RESTORE}")):
        return zarr.open_array(LocalStore(arrays_path(path), read_only=True), path=name, mode="r", zarr_format=3)


def _read_text_features(path: Path, manifest: Manifest) -> np.ndarray:
    damaged = UserError(f"{arrays_path(path) / TEXT_FEATURES} does not match the manifest: {_RESTORE}")
    array = _open_array(path, TEXT_FEATURES)
    with _refusing(damaged):
        text_features = np.asarray(array[...])
    if ArrayDigest.of(text_features) != manifest.text_features:
        raise damaged
    return text_features


@contextmanager
def _refusing(damage: UserError) -> Iterator[None]:
    """Raises `damage` in place of what Zarr and its codecs raise on damaged bytes."""
    try:
        yield
    except (ValueError, TypeError, KeyError, RuntimeError, FileNotFoundError) as error:
        raise damage from error
