"""Completion records: the only proof that a shard is done. Files in arrays/ prove nothing, as a kill can leave some."""

from pydantic import BaseModel, PositiveInt, ValidationError

from cache.base import Store
from cache.layout import record_key, shard_key
from cache.manifest import Manifest
from cache.sealed import FileDigest, seal, unseal
from configs.errors import UserError

_CURE = "run cache repair, or precompute with the same settings again: both recompute only this shard"


class ArrayRecord(BaseModel, frozen=True, extra="forbid"):
    """One array's files of a shard, one per view, as written."""

    shape: tuple[int, ...]  # of one view: (rows of the shard, *tail)
    dtype: str
    files: tuple[FileDigest, ...]


class ShardRecord(BaseModel, frozen=True, extra="forbid"):
    """The content of shards/<index>.json."""

    fingerprint: str  # of the settings that the shard was made from
    rows: tuple[int, int]  # first row, and the row after the last
    views: PositiveInt  # how many are done
    arrays: dict[str, ArrayRecord]
    skipped: dict[str, str] = {}  # image id -> why it could not be read; its rows hold nothing

    def to_bytes(self) -> bytes:
        return seal(self.model_dump(mode="json"))

    def digests(self, manifest: Manifest, index: int) -> dict[str, FileDigest]:
        """The digest of every file that this record of shard `index` lists, by key."""
        return {
            shard_key(name, index, view, manifest.arrays[name]): digest
            for name, array in self.arrays.items()
            for view, digest in enumerate(array.files)
        }


def load_record(store: Store, manifest: Manifest, index: int) -> ShardRecord:
    """The record of shard `index`; UserError if it is missing, damaged, or of another cache."""
    try:
        data = store.read(record_key(index))
    except FileNotFoundError:
        raise UserError(f"{store.show(record_key(index))} is missing: {_CURE}") from None
    return _parse(data, store, manifest, index)


def load_records(store: Store, manifest: Manifest) -> dict[int, ShardRecord | UserError]:
    """What `load_record` returns or raises for every shard that has a record file, by index."""
    keys = {record_key(index): index for index in range(manifest.shards)}
    found: dict[int, ShardRecord | UserError] = {}
    for key, data in store.read_many(keys).items():
        try:
            found[keys[key]] = _parse(data, store, manifest, keys[key])
        except UserError as error:
            found[keys[key]] = error
    return found


def _parse(data: bytes, store: Store, manifest: Manifest, index: int) -> ShardRecord:
    path = store.show(record_key(index))
    try:
        record = ShardRecord.model_validate(unseal(data))
    except ValidationError as error:
        raise UserError(f"{path} is damaged ({error.errors()[0]['msg']}): {_CURE}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {_CURE}") from error
    if record.fingerprint != manifest.fingerprint:
        raise UserError(f"{path} belongs to a cache made with other settings: {_CURE}")
    found = {name: (array.shape, array.dtype, len(array.files)) for name, array in record.arrays.items()}
    wanted = {
        name: (manifest.shard_shape(name, index), spec.dtype, manifest.array_views(name, record.views))
        for name, spec in manifest.arrays.items()
    }
    if record.rows != manifest.shard_rows(index) or record.views > manifest.views or found != wanted:
        raise UserError(f"{path} describes other rows or arrays than the manifest: {_CURE}")
    return record
