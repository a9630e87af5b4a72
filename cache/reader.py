"""Reading a cache. Damaged or missing data is an error that names the remedy; it never reads as zeros."""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from cache.base import Store
from cache.dense import DENSE_SCALES, DENSE_TOKENS, decode_dense
from cache.encoding import ShardCodec, decode_pca, decode_whole, is_of_whole_array, refusing
from cache.layout import ARRAYS, COPIES, IMAGE_IDS, MANIFEST, SHARDS, TEXT_FEATURES, ArraySpec, shard_key
from cache.manifest import Manifest
from cache.record import ShardRecord, load_records
from cache.sealed import FileDigest
from cache.store import open_store, place_of
from configs.errors import UserError

_RESTORE = "run cache repair, or precompute with the same settings again: both restore this file"


class Cache:
    """A complete cache, from `open_cache`. Image arrays stay on disk; it can be sent to other processes.

    Attributes:
        location: the folder or URL.
        image_ids: N ids; row i of every array belongs to image i.
        kept_rows: the rows of readable images, ascending; unreadable images were skipped.
        text_features: (K, C) float32, unit length.
        names: the arrays that it stores, or borrows from another cache.
    """

    def __init__(self, location: str, manifest: Manifest, records: list[ShardRecord]) -> None:
        self.location = location
        self.manifest = manifest
        self.image_ids = list(json.loads(self._small_file(IMAGE_IDS)))
        self._records = records
        self._lenders = _open_lenders(location, manifest)
        self.names = sorted({*manifest.arrays, *manifest.borrowed})
        skipped = self.skipped()
        self.kept_rows = np.array([row for row, name in enumerate(self.image_ids) if name not in skipped], np.int64)
        files = {key: self._small_file(key) for key in manifest.files if is_of_whole_array(key)}
        self.text_features = decode_whole(TEXT_FEATURES, files)
        self._pca = decode_pca(files)

    def skipped(self) -> dict[str, str]:
        """Id -> reason for images that could not be read, in this cache or the one it borrows from."""
        own = {image_id: reason for record in self._records for image_id, reason in record.skipped.items()}
        lent = {name: why for lender in self._lenders.values() for name, why in lender.skipped().items()}
        return {**lent, **own}

    def load(self, name: str, views: int | None = None) -> np.ndarray:
        """The whole array `name` as stored, (N, V, *tail), checked against the completion records.

        V is that of the manifest, or less for an array with only the first views stored. With `views`, only files of
        that many first views are read, and V is at most `views`.

        Raises:
            UserError: there is no such array, or a shard is missing or damaged.
        """
        whole: np.ndarray | None = None
        for index, block in enumerate(self._blocks(name, range(self.manifest.shards), views)):
            if whole is None:
                whole = np.empty((self.manifest.images, *block.shape[1:]), block.dtype)
            start, stop = self.manifest.shard_rows(index)
            whole[start:stop] = block
        assert whole is not None  # N is positive
        return whole

    def load_shard(self, name: str, index: int) -> np.ndarray:
        """Shard `index` of array `name`, (rows of the shard, V, *tail); checked, and errors, as in `load`."""
        return next(self._blocks(name, [index]))

    def read(self, name: str, row: int, view: int | None = None) -> np.ndarray:
        """One image of array `name` as stored, (V, *tail), or one view of it, (*tail); see `ArrayReader`."""
        return self.reader(name)(row, view)

    def reader(self, name: str) -> "ArrayReader":
        """The reader of array `name` that `read` uses; UserError if there is no such array."""
        self._require(name)
        if name in self._lenders:
            lent = self._lenders[name].reader(name)
            return replace(lent, views=min(lent.views, self.manifest.views))
        return ArrayReader(self.location, self.manifest, name, self.manifest.array_views(name))

    def dense_tokens(self, row: int) -> np.ndarray:
        """The dense tokens of one image, (V, G, G, C) float32, however they are stored; errors as in `read`."""
        if DENSE_TOKENS in self._lenders:
            return self._lenders[DENSE_TOKENS].dense_tokens(row)[: self.manifest.views]
        names = [name for name in (DENSE_TOKENS, DENSE_SCALES) if name in self.names] or [DENSE_TOKENS]
        return decode_dense({name: self.read(name, row) for name in names}, self._pca)

    def _blocks(self, name: str, indices: Iterable[int], views: int | None = None) -> Iterator[np.ndarray]:
        """The shards of array `name`, (rows of the shard, V, *tail) each; V is at most `views`."""
        self._require(name)
        if name in self._lenders:
            most = self.manifest.views if views is None else min(views, self.manifest.views)
            yield from self._lenders[name]._blocks(name, indices, most)
            return
        store, spec, codec = open_store(self.location), self.manifest.arrays[name], ShardCodec(self.manifest, name)
        for index in indices:
            rows, *tail = self.manifest.shard_shape(name, index)
            held = self.manifest.array_views(name)
            block = np.empty((rows, held if views is None else min(views, held), *tail), spec.dtype)
            keys = [shard_key(name, index, view, spec) for view in range(block.shape[1])]
            found = store.read_many(keys)
            digests = self._records[index].arrays[name].files[: len(keys)]
            for view, (key, digest) in enumerate(zip(keys, digests, strict=True)):
                if key not in found or FileDigest.of(found[key]) != digest:
                    raise _damaged(store, key)
                with refusing(_damaged(store, key)):
                    block[:, view] = codec.decode(index, view, found.pop(key))
            yield block

    def _require(self, name: str) -> None:
        if name not in self.names:
            held = ", ".join(self.names)
            raise UserError(
                f"{self.location} has no {name} (it has {held}): run precompute with a setting that stores it"
            )

    def _small_file(self, key: str) -> bytes:
        store = open_store(self.location)
        data = store.read_many([key]).get(key)
        if data is None or FileDigest.of(data) != self.manifest.files.get(key):
            raise UserError(f"{store.show(key)} is missing or does not match the manifest: {_RESTORE}")
        return data


@dataclass(frozen=True)
class ArrayReader:
    """Reads single images, or views, of one array. It is small: it omits the records.

    `views`: the number of first views that it returns.
    """

    location: str
    manifest: Manifest
    name: str
    views: int

    def __call__(self, row: int, view: int | None = None) -> np.ndarray:
        """One image as stored, (V, *tail), or one view of it, (*tail), for which only that view's file is read.

        Checked with the checksums inside the shard; hashing the whole file for one image would be too slow.

        Raises:
            IndexError: there is no such row or view.
            UserError: what is to be read is missing or damaged.
        """
        if not 0 <= row < self.manifest.images:
            raise IndexError(f"row {row} of {self.manifest.images}")
        if view is not None and not 0 <= view < self.views:
            raise IndexError(f"view {view} of {self.views}")
        store, spec = open_store(self.location), self.manifest.arrays[self.name]
        array, found = self._open(store, spec), []
        for each in range(self.views) if view is None else [view]:
            key = shard_key(self.name, row // self.manifest.shard_images, each, spec)
            if not store.exists(key):
                raise _damaged(store, key)  # Zarr would make up zeros
            with refusing(_damaged(store, key)):
                found.append(np.asarray(store.attempt("read", key, partial(array.__getitem__, (row, each)))))
        return np.stack(found) if view is None else found[0]

    def _open(self, store: Store, spec: ArraySpec) -> zarr.Array[Any]:
        metadata = f"{ARRAYS}/{self.name}/zarr.json"
        with refusing(UserError(f"{store.show(metadata)} is missing or damaged: {_RESTORE}")):
            digest = self.manifest.files[metadata].sha256
            array = store.attempt("read", metadata, lambda: _open_array(self.location, self.name, digest))
            images, held, *tail = array.shape  # more views may have been added since this cache was opened
            whole = (self.manifest.images, *spec.tail, spec.dtype)
            if (images, *tail, str(array.dtype)) != whole or held < self.manifest.array_views(self.name):
                raise ValueError(f"of shape {array.shape} and type {array.dtype}")
        return array


def _damaged(store: Store, key: str) -> UserError:
    return UserError(
        f"{store.show(key)} is missing or does not match its completion record: run cache repair, which recomputes "
        "only this shard"
    )


@lru_cache(maxsize=64)
def _open_array(location: str, name: str, digest: str) -> zarr.Array[Any]:
    """`digest` is that of zarr.json: when an array has grown, `lru_cache` opens it again."""
    return zarr.open_array(open_store(location).as_zarr(ARRAYS), path=name, mode="r", zarr_format=3)


def open_cache(location: str | Path) -> Cache:
    """The cache at a path or URL.

    Raises:
        UserError: there is no cache, it is incomplete, or a file other than a shard is damaged.
    """
    store = open_store(location)
    manifest = Manifest.load(store)
    found = load_records(store, manifest)
    records = [record for _, record in sorted(found.items()) if isinstance(record, ShardRecord)]
    damaged = [record for record in found.values() if isinstance(record, UserError)]
    if damaged:
        raise damaged[0]
    done = sum(record.views == manifest.views for record in records)
    if done < manifest.shards:
        raise UserError(
            f"{location} is incomplete, {done} of {manifest.shards} shards are done: "
            "run precompute with the same settings again to continue"
        )
    return Cache(store.location, manifest, records)


def _open_lenders(location: str, manifest: Manifest) -> dict[str, Cache]:
    """The caches that `manifest` borrows arrays from, by array; each is opened once."""
    opened: dict[str, Cache] = {}
    for name, borrowed in manifest.borrowed.items():
        place = place_of(borrowed.cache, location)
        try:
            lender = opened.get(borrowed.cache) or open_cache(place)
        except UserError as error:
            raise UserError(
                f"{location} shares {name} with {place} ({error}): if that cache was moved, run cache repair "
                f"{location} --lender NEW_PLACE"
            ) from error
        same = lender.manifest.fingerprint == borrowed.fingerprint and lender.manifest.views >= manifest.views
        if not same or lender.manifest.shard_images != manifest.shard_images or name not in lender.names:
            raise UserError(
                f"{location} shares {name} with {place}, which has changed: restore the old one, or run "
                "precompute again"
            )
        opened[borrowed.cache] = lender
    return {name: opened[borrowed.cache] for name, borrowed in manifest.borrowed.items()}


def find_caches(root: Path) -> Iterator[Cache]:
    """Complete caches at or below the folder `root`, most recently finished first, opened one by one."""

    def finished(path: Path) -> float:
        return max((record.stat().st_mtime for record in (path / SHARDS).glob("*.json")), default=0.0)

    paths = [file.parent for file in root.rglob(MANIFEST) if file.parent.name != COPIES]
    for path in sorted(paths, key=lambda path: (finished(path), path), reverse=True):
        with suppress(UserError):
            yield open_cache(path)
