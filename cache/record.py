"""Completion records: the only proof that a shard is done. Files under arrays/ prove nothing: a kill leaves some."""

from pathlib import Path

from pydantic import BaseModel, ValidationError

from cache.files import read_json
from cache.layout import record_path
from cache.manifest import ArrayDigest, Manifest
from configs.errors import UserError


class ShardRecord(BaseModel, frozen=True, extra="forbid"):
    """The content of shards/<index>.json."""

    fingerprint: str  # of the settings that the shard was made from
    rows: tuple[int, int]  # first row, and the row after the last
    arrays: dict[str, ArrayDigest]
    skipped: dict[str, str] = {}  # image id -> why it could not be read; its rows hold nothing


def load_record(cache: Path, manifest: Manifest, index: int) -> ShardRecord:
    """The record of shard `index`; UserError if it is missing, damaged, or of another cache."""
    path = record_path(cache, index)
    cure = "run precompute with the same settings again, it recomputes only this shard"
    content = read_json(path, cure)
    try:
        record = ShardRecord.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path} is damaged ({error.errors()[0]['msg']}): {cure}") from error
    if record.fingerprint != manifest.fingerprint:
        raise UserError(f"{path} belongs to a cache made from other settings: {cure}")
    shapes = {name: (digest.shape, digest.dtype) for name, digest in record.arrays.items()}
    wanted = {name: (manifest.shard_shape(name, index), spec.dtype) for name, spec in manifest.arrays.items()}
    if record.rows != manifest.shard_rows(index) or shapes != wanted:
        raise UserError(f"{path} describes other rows or arrays than the manifest: {cure}")
    return record
