"""Finds files of a cache that are missing or have changed, and prepares their repair."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cache.base import TEMPORARY, Store
from cache.copies import restore, small_files, trusted_manifest
from cache.layout import ARRAYS, COPIES, MANIFEST, SHARDS, copy_key, record_key, shard_key
from cache.manifest import Manifest
from cache.record import ShardRecord, load_records
from cache.sealed import FileDigest
from cache.store import open_store
from configs.errors import UserError

_Records = dict[int, ShardRecord | UserError]  # as `load_records` finds them


@dataclass(frozen=True)
class Damage:
    """A bad file. A stray is a leftover that no record lists: harmless, and deleted by `gc`.

    `shard`: the one to recompute; None for small files, which are restored from their copies, and for strays.
    """

    kind: Literal["missing", "changed", "stray"]
    key: str
    path: str  # for people
    shard: int | None = None


def verify(location: str | Path) -> list[Damage]:
    """Reread every byte; the list is empty if all is well. Shards that are not computed yet are not damage.

    Raises:
        UserError: there is no cache, or both the manifest and its copy are damaged.
    """
    store = open_store(location)
    manifest = trusted_manifest(store)
    records = load_records(store, manifest)
    return [
        *_bad_small_files(store, manifest),
        *_bad_shards(store, manifest, records),
        *_strays(store, manifest, records),
    ]


def _bad_small_files(store: Store, manifest: Manifest) -> Iterator[Damage]:
    for pair in small_files(store, manifest):
        for file in pair:
            if not file.is_good:
                yield Damage("missing" if file.data is None else "changed", file.key, store.show(file.key))


def _bad_shards(store: Store, manifest: Manifest, records: _Records) -> Iterator[Damage]:
    for index, record in sorted(records.items()):
        if not isinstance(record, ShardRecord):
            yield Damage("changed", record_key(index), store.show(record_key(index)), index)
            continue
        for key, digest in record.digests(manifest, index).items():
            try:
                if FileDigest.of(store.read(key)) != digest:
                    yield Damage("changed", key, store.show(key), index)
            except FileNotFoundError:
                yield Damage("missing", key, store.show(key), index)


def _strays(store: Store, manifest: Manifest, records: _Records) -> list[Damage]:
    """Temporary files, and files in the cache's folders that no record lists."""
    known = {MANIFEST, *manifest.files}
    known |= {copy_key(key) for key in known}
    for index, record in records.items():
        known.add(record_key(index))
        if isinstance(record, ShardRecord):
            known |= record.digests(manifest, index).keys()
        else:  # a damaged record vouches for nothing, but its shard is recomputed
            known |= {
                shard_key(name, index, view, spec)
                for name, spec in manifest.arrays.items()
                for view in range(manifest.array_views(name))
            }
    own = tuple(f"{folder}/" for folder in (ARRAYS, SHARDS, COPIES))
    return [
        Damage("stray", key, store.show(key))
        for key in store.sizes()
        if key not in known and (key.startswith(own) or key == MANIFEST + TEMPORARY)
    ]


def prepare_repair(location: str | Path) -> list[Damage]:
    """Restores small files and deletes the records of bad shards, which become `pending`; returns what `verify` found.

    `create_cache` restores the rest (small files damaged together with their copies).

    Raises:
        UserError: as `verify`, or another precompute is at work.
    """
    store = open_store(location)
    trusted_manifest(store)  # a lock would make the folder of a cache that is not there
    with store.lock():
        found = verify(location)
        restore(store, trusted_manifest(store))
        for index in {damage.shard for damage in found} - {None}:
            assert index is not None
            store.delete(record_key(index))
    return found


def gc(location: str | Path) -> tuple[list[str], int]:
    """Deletes strays: temporary files, files of shards without a record, unknown files in the cache's own folders.

    Returns:
        Their paths, and how many bytes were freed.

    Raises:
        UserError: there is no cache, or another precompute is at work.
    """
    store = open_store(location)
    trusted_manifest(store)  # as above
    with store.lock():
        sizes, manifest = store.sizes(), trusted_manifest(store)
        strays = _strays(store, manifest, load_records(store, manifest))
        for stray in strays:
            store.delete(stray.key)
    return [stray.path for stray in strays], sum(sizes.get(stray.key, 0) for stray in strays)


@dataclass(frozen=True)
class Info:
    """What a cache holds."""

    location: str
    manifest: Manifest
    shards_done: int
    views_done: int  # of all images' views, those in shards that are done
    skipped: int  # images
    array_bytes: dict[str, int]
    other_bytes: int


def info(location: str | Path) -> Info:
    """Reads only the manifest, the records and the files' sizes; UserError if there is no cache."""
    store = open_store(location)
    manifest = Manifest.load(store)
    records = {i: record for i, record in load_records(store, manifest).items() if isinstance(record, ShardRecord)}
    array_bytes = {name: 0 for name in manifest.arrays}
    other_bytes = 0
    for key, size in store.sizes().items():
        folder, _, rest = key.partition("/")
        name = rest.partition("/")[0]
        if folder == ARRAYS and name in array_bytes:
            array_bytes[name] += size
        else:
            other_bytes += size
    return Info(
        location=store.location,
        manifest=manifest,
        shards_done=sum(record.views == manifest.views for record in records.values()),
        views_done=sum((record.rows[1] - record.rows[0]) * record.views for record in records.values()),
        skipped=len({image_id for record in records.values() for image_id in record.skipped}),
        array_bytes=array_bytes,
        other_bytes=other_bytes,
    )
