"""Making a cache: create it, list what is pending, write it. The same calls continue a killed run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cache.base import TEMPORARY, Store
from cache.copies import file_pairs, restore, trusted_manifest
from cache.dense import Pca
from cache.encoding import ShardCodec, decode_pca, encode_small_files, is_of_pca, is_of_whole_array
from cache.layout import ARRAYS, COPIES, MANIFEST, SHARDS, copy_key, record_key, shard_key
from cache.manifest import Borrowed, Manifest, check_same_contents, check_settings
from cache.record import ArrayRecord, ShardRecord, load_record, load_records
from cache.sealed import FileDigest
from cache.store import open_store
from configs.errors import UserError


def create_cache(
    location: str | Path,
    manifest: Manifest,
    image_ids: Sequence[str],
    text_features: np.ndarray,
    pca: Pca | None = None,
) -> Manifest:
    """Create the cache, or open an existing one with the same settings.

    A cache with fewer views than `manifest` is extended: the missing views become pending in every shard. One with
    more views stays as it is.

    Args:
        manifest: `Manifest.describe(...)` of these images.
        image_ids: N names; row i of every array belongs to image i.
        text_features: (K, C) float32.
        pca: the PCA of the dense tokens, if these are stored as principal components; see `stored_pca`.

    Returns:
        The manifest as stored. An existing cache keeps the versions, text features and PCA of the run that created it.

    Raises:
        UserError: the location holds something else, or a cache with other settings or images, or a small file that is
            damaged together with its copy and for which this machine computes different bytes.
    """
    store = open_store(location)
    small = encode_small_files(manifest, image_ids, text_features, pca)
    manifest = manifest.model_copy(update={"files": {key: FileDigest.of(data) for key, data in small.items()}})
    if not _is_begun(store):
        _place(store, manifest, small)
        return manifest
    stored = trusted_manifest(store)
    check_settings(store.location, stored, manifest.settings)
    check_same_contents(store.location, stored, manifest)
    same = stored.views == manifest.views
    as_stored = small if same else encode_small_files(stored, image_ids, text_features, pca)
    lost = restore(store, stored, as_stored)
    if lost:
        raise UserError(
            f"{store.show(lost[0])} and its copy are damaged, and this machine computes different bytes: delete "
            f"{store.location} and run precompute again"
        )
    return _extend(store, stored, manifest.views, small) if manifest.views > stored.views else stored


def _is_begun(store: Store) -> bool:
    """Whether there is a cache; what a killed creation left is cleared away, and UserError raised for other files.

    A creation writes the manifest's copy first and the manifest last. A copy alone is thus a killed creation's, or a
    cache's that lost its manifest: only the latter has shards.
    """
    if store.exists(MANIFEST):
        return True
    files = store.sizes()
    if copy_key(MANIFEST) in files or copy_key(MANIFEST) + TEMPORARY in files:
        if any(key.startswith(f"{SHARDS}/") for key in files):
            return True
        for key in files:
            if key.startswith((f"{ARRAYS}/", f"{COPIES}/")) and key != copy_key(MANIFEST):
                store.delete(key)  # it may have been started with other settings, hence other arrays
    elif files:
        raise UserError(
            f"{store.location} exists and is not a cache (it has no {MANIFEST}): choose another --cache, or empty it"
        )
    return False


def _place(store: Store, manifest: Manifest, small: Mapping[str, bytes]) -> None:
    store.write(copy_key(MANIFEST), manifest.to_bytes())
    for key, data in small.items():
        store.write(key, data)
        store.write(copy_key(key), data)
    store.write(MANIFEST, manifest.to_bytes())


def _extend(store: Store, stored: Manifest, views: int, small: Mapping[str, bytes]) -> Manifest:
    """Raises the number of views. Until the manifest is written, everything fits the old one; copies follow it."""
    # Computed again on another machine, text features and PCA may differ in the last bits: those of the first run stay.
    made = {key: FileDigest.of(data) for key, data in small.items() if not is_of_whole_array(key)}
    grown = stored.model_copy(update={"views": views, "files": {**stored.files, **made}})
    for key, digest in made.items():
        if stored.files[key] != digest:
            store.write(key, small[key])
    store.write(MANIFEST, grown.to_bytes())
    restore(store, grown)
    return grown


def relink(location: str | Path, borrowed: Mapping[str, Borrowed]) -> None:
    """Update the locations of the caches that an existing cache borrows from, if they are the same caches."""
    store = open_store(location)
    try:
        stored = trusted_manifest(store)
    except UserError:
        return  # there is none yet
    old, new = ({name: lent.fingerprint for name, lent in all_.items()} for all_ in (stored.borrowed, borrowed))
    if old == new and stored.borrowed != borrowed:
        data = stored.model_copy(update={"borrowed": dict(borrowed)}).to_bytes()
        for key in (MANIFEST, copy_key(MANIFEST)):
            store.write(key, data)


def stored_pca(location: str | Path) -> Pca | None:
    """The existing cache's PCA, from its files or their copies; None if there is none, or both are lost.

    It is fitted once, when a cache is created, because stored tokens must be decoded with the same PCA.
    """
    store = open_store(location)
    try:
        manifest = trusted_manifest(store)
    except UserError:
        return None
    wanted = {key: digest for key, digest in manifest.files.items() if is_of_pca(key)}
    pairs = file_pairs(store, wanted) if wanted else []
    files = {pair[0].key: file.data for pair in pairs for file in pair if file.is_good and file.data is not None}
    return decode_pca(files) if len(files) == len(wanted) else None


def pending(location: str | Path, manifest: Manifest | None = None) -> list[tuple[int, int]]:
    """(index of the shard, first missing view) of everything still to be computed, ascending.

    `manifest` is the stored one, or one that will be passed to `create_cache`.

    A shard without a valid record starts at view 0; one with a record for fewer views than the manifest's V starts at
    the first missing view.
    """
    store = open_store(location)
    manifest = manifest or Manifest.load(store)
    records = load_records(store, manifest)
    done = {index: record.views for index, record in records.items() if isinstance(record, ShardRecord)}
    first_views = [(index, done.get(index, 0)) for index in range(manifest.shards)]
    return [(index, first_view) for index, first_view in first_views if first_view < manifest.views]


def write_shard(
    location: str | Path,
    index: int,
    first_view: int,
    arrays: Mapping[str, np.ndarray],
    skipped: Mapping[str, str] | None = None,
) -> None:
    """Write the views of shard `index` from `first_view` on, then its record. On return, the shard is durably done.

    Different shards can be written in parallel, as they share no files.

    Args:
        first_view: as `pending` says; the record that is there covers the views before it.
        arrays: name -> (rows of the shard, views, *tail), for every array of the manifest: the views from `first_view`
            to the last, of an array that holds fewer those that are left, perhaps none.
        skipped: ids of this shard's images that could not be read, and why; readers leave their rows out.

    Raises:
        ValueError: a name, shape or dtype is not the manifest's, or the record does not end before `first_view`.
        IndexError: there is no such shard.
        UserError: the store cannot be written.
    """
    store = open_store(location)
    manifest = Manifest.load(store)
    wanted = {}
    for name, spec in manifest.arrays.items():
        rows, *tail = manifest.shard_shape(name, index)
        wanted[name] = ((rows, max(0, manifest.array_views(name) - first_view), *tail), spec.dtype)
    given = {name: (array.shape, str(array.dtype)) for name, array in arrays.items()}
    if given != wanted:
        raise ValueError(f"shard {index} of {location} from view {first_view} takes {wanted}, given {given}")

    before: ShardRecord | None = None
    if first_view:
        before = load_record(store, manifest, index)
        if before.views != first_view:
            raise ValueError(f"shard {index} of {location} has {before.views} views, given those from {first_view}")
    else:
        store.delete(record_key(index))  # a rewritten shard is only done when its new record exists
    records = {}
    for name, spec in manifest.arrays.items():
        codec, files = ShardCodec(manifest, name), [] if before is None else list(before.arrays[name].files)
        for view, block in enumerate(np.moveaxis(arrays[name], 1, 0), start=first_view):
            data = codec.encode(index, view, block)
            store.write(shard_key(name, index, view, spec), data)
            files.append(FileDigest.of(data))
        records[name] = ArrayRecord(shape=manifest.shard_shape(name, index), dtype=spec.dtype, files=tuple(files))
    done = ShardRecord(
        fingerprint=manifest.fingerprint,
        rows=manifest.shard_rows(index),
        views=manifest.views,
        arrays=records,
        skipped={**(skipped or {}), **(before.skipped if before else {})},
    )
    store.write(record_key(index), done.to_bytes())


def forget_skipped(location: str | Path) -> int:
    """Delete the records of shards with skipped images, which are then `pending`. Returns how many images these are."""
    store = open_store(location)
    records = load_records(store, Manifest.load(store))
    found = {index: len(record.skipped) for index, record in records.items() if isinstance(record, ShardRecord)}
    for index, count in found.items():
        if count:
            store.delete(record_key(index))
    return sum(found.values())


def list_skipped(location: str | Path) -> dict[str, str]:
    """Collect the skipped images from all completion records, write them to the manifest, and return them."""
    store = open_store(location)
    manifest = Manifest.load(store)
    skipped: dict[str, str] = {}
    for _, record in sorted(load_records(store, manifest).items()):
        if not isinstance(record, ShardRecord):
            raise record
        skipped |= record.skipped
    data = manifest.model_copy(update={"skipped": skipped}).to_bytes()
    for key in (MANIFEST, copy_key(MANIFEST)):
        if store.read_many([key]).get(key) != data:
            store.write(key, data)
    return skipped
