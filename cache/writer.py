"""Making a cache: create it, ask which shards are pending, write those. A killed run is continued by the same calls."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cache.encoding import encode_metadata, encode_shard
from cache.files import (
    make_directory,
    move_durably,
    sync_directory,
    temporary,
    to_json,
    write_atomically,
    write_durably,
)
from cache.layout import TEXT_FEATURES, arrays_path, image_ids_path, manifest_path, record_path, shard_path, shards_path
from cache.manifest import ArrayDigest, Manifest, check_settings, different_settings
from cache.record import ShardRecord, load_record
from configs.errors import UserError


def create_cache(path: Path, manifest: Manifest, image_ids: Sequence[str], text_features: np.ndarray) -> Manifest:
    """Creates the cache at `path`, or opens the one that is there if it was made from the same settings.

    Args:
        manifest: `Manifest.describe(...)` of the two arguments below.
        image_ids: N names; row i of every array belongs to image i.
        text_features: (K, C) float32.

    Returns:
        The manifest on disk. For a cache that was there before, its versions and text features are those of the run
        that began it.

    Raises:
        UserError: `path` holds something else, or a cache made from other settings or images.
    """
    if manifest_path(path).exists():
        stored = Manifest.load(path)
        check_settings(path, stored, manifest.settings)
        _check_same_contents(path, stored, manifest)
        _write_small_files(path, stored, image_ids, text_features)  # mends what was damaged
        return stored
    # The manifest is written first under its temporary name and moved into place last, so that name marks a creation
    # that was killed. A directory with neither name is somebody's own.
    unplaced = temporary(manifest_path(path))
    if path.exists() and not unplaced.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(
            f"{path} exists and is not a cache (it has no manifest.json): choose another --cache, or empty it"
        )
    if unplaced.exists() and arrays_path(path).exists():
        shutil.rmtree(arrays_path(path))  # it may have been begun with other settings, hence other arrays
    make_directory(path)
    write_durably(unplaced, manifest.to_bytes())
    sync_directory(path)
    _write_small_files(path, manifest, image_ids, text_features)
    move_durably(unplaced, manifest_path(path))
    return manifest


def _write_small_files(path: Path, manifest: Manifest, image_ids: Sequence[str], text_features: np.ndarray) -> None:
    """Writes image_ids.json, every zarr.json and the text features, where they are missing or hold something else."""
    files = {arrays_path(path) / key: data for key, data in encode_metadata(manifest, text_features)}
    files[image_ids_path(path)] = to_json(list(image_ids))
    if ArrayDigest.of(text_features) != manifest.text_features:
        # Computed again on another machine, the last bits may differ: those of the run that began the cache stay.
        files = {file: data for file, data in files.items() if file.parent.name != TEXT_FEATURES}
    make_directory(shards_path(path))
    for file, data in files.items():
        if not file.is_file() or file.read_bytes() != data:
            make_directory(file.parent)
            write_atomically(file, data)


def _check_same_contents(path: Path, stored: Manifest, asked: Manifest) -> None:
    """UserError unless both manifests have the same images and arrays, which settings alone cannot promise."""
    contents = {"images", "views", "shard_images", "arrays", "image_ids_sha256"}
    old, new = (manifest.model_dump(mode="json", include=contents) for manifest in (stored, asked))
    if old != new:
        lines = "; ".join(different_settings(old, new))
        raise UserError(f"{path} was made from the same settings but other data ({lines}): choose another --cache")


def pending_shards(path: Path) -> list[int]:
    """Indices of the shards still to be computed, ascending: those without a record that fits the manifest."""
    manifest = Manifest.load(path)
    return [index for index in range(manifest.shards) if not _is_done(path, manifest, index)]


def _is_done(path: Path, manifest: Manifest, index: int) -> bool:
    try:
        load_record(path, manifest, index)
    except UserError:
        return False
    return True


def write_shard(
    path: Path, index: int, arrays: Mapping[str, np.ndarray], skipped: Mapping[str, str] | None = None
) -> None:
    """Writes shard `index` of every array, then its record: when this returns, the shard is done and on disk.

    Safe in parallel for different shards, as they share no file; one task owns one shard.

    Args:
        arrays: name -> (rows of the shard, V, *tail), for every image array of the manifest.
        skipped: ids of this shard's images that could not be read, and why; readers leave their rows out.

    Raises:
        ValueError: a name, shape or dtype is not the manifest's.
        IndexError: there is no such shard.
    """
    manifest = Manifest.load(path)
    wanted = {name: (manifest.shard_shape(name, index), spec.dtype) for name, spec in manifest.arrays.items()}
    given = {name: (array.shape, str(array.dtype)) for name, array in arrays.items()}
    if given != wanted:
        raise ValueError(f"shard {index} of {path} takes {wanted}, given {given}")

    record = record_path(path, index)
    if record.exists():  # a shard written anew is not done until its new record is there
        record.unlink()
        sync_directory(record.parent)
    for name, spec in manifest.arrays.items():
        write_atomically(shard_path(path, name, index, spec), encode_shard(manifest, name, index, arrays[name]))
    digests = {name: ArrayDigest.of(arrays[name]) for name in manifest.arrays}
    done = ShardRecord(
        fingerprint=manifest.fingerprint, rows=manifest.shard_rows(index), arrays=digests, skipped=dict(skipped or {})
    )
    write_atomically(record, to_json(done.model_dump(mode="json")))


def list_skipped(path: Path) -> dict[str, str]:
    """Gathers the skipped images of all completion records in the manifest, for people to read, and returns them."""
    manifest = Manifest.load(path)
    records = [load_record(path, manifest, index) for index in range(manifest.shards)]
    skipped = {image_id: reason for record in records for image_id, reason in record.skipped.items()}
    if skipped != manifest.skipped:
        write_atomically(manifest_path(path), manifest.model_copy(update={"skipped": skipped}).to_bytes())
    return skipped
