"""Converts arrays to Zarr's bytes and back, in memory.

Zarr writes files without fsync, leaves *.partial files when killed, merges a shard with what is on disk, and reads
missing data as zeros. Here it therefore only works on a dictionary; a store (cache/base.py) reads and writes the bytes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import zarr
from zarr.codecs import ZstdCodec
from zarr.core.buffer import Buffer, cpu
from zarr.storage import MemoryStore

from cache.dense import Pca
from cache.layout import ARRAYS, IMAGE_IDS, PCA_COMPONENTS, PCA_MEAN, TEXT_FEATURES, shard_key
from cache.manifest import Manifest
from cache.sealed import to_json
from configs.errors import UserError

_COMMON: dict[str, Any] = {
    # The checksum lets a read of a single image notice flipped bits. Float16 tokens shrink by 8 % at any level.
    "compressors": ZstdCodec(level=1, checksum=True),
    # All files of an array in one directory, so that one fsync makes their names last.
    "chunk_key_encoding": {"name": "default", "separator": "."},
    # Otherwise a chunk that is all zeros is left out, and cannot be told from one that was lost.
    "config": {"write_empty_chunks": True},
}


def encode_small_files(
    manifest: Manifest, image_ids: Sequence[str], text_features: np.ndarray, pca: Pca | None = None
) -> dict[str, bytes]:
    """Every file of a cache without shards but its manifest, by key: ids, zarr.json files, text features, PCA."""
    files: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(files))
    for name in manifest.arrays:
        _create_array(group, name, manifest)
    whole = {TEXT_FEATURES: text_features}
    if pca is not None:
        whole |= {PCA_MEAN: pca.mean, PCA_COMPONENTS: pca.components}
    for name, array in whole.items():
        group.create_array(name, data=array, chunks=array.shape, **_COMMON)
    encoded = {f"{ARRAYS}/{key}": buffer.to_bytes() for key, buffer in sorted(files.items())}
    return {IMAGE_IDS: to_json(list(image_ids)), **encoded}


def is_of_whole_array(key: str) -> bool:
    """Whether the small file `key` is part of an array that is not one of single images, but the whole cache's."""
    return key.startswith(f"{ARRAYS}/{TEXT_FEATURES}/") or is_of_pca(key)


def is_of_pca(key: str) -> bool:
    return key.startswith((f"{ARRAYS}/{PCA_MEAN}/", f"{ARRAYS}/{PCA_COMPONENTS}/"))


def decode_pca(files: Mapping[str, bytes]) -> Pca | None:
    """The PCA from its small files; None if the cache has none."""
    if not any(map(is_of_pca, files)):
        return None
    return Pca(decode_whole(PCA_MEAN, files), decode_whole(PCA_COMPONENTS, files))


def decode_whole(name: str, files: Mapping[str, bytes]) -> np.ndarray:
    """The array `name`, which belongs to the whole cache, from its small files."""
    own = {key.removeprefix(f"{ARRAYS}/"): data for key, data in files.items() if key.startswith(f"{ARRAYS}/{name}/")}
    buffers: dict[str, Buffer] = {key: cpu.Buffer.from_bytes(data) for key, data in own.items()}
    return np.asarray(zarr.open_array(MemoryStore(buffers), path=name, mode="r", zarr_format=3)[...])


class ShardCodec:
    """The files of one array's shards; one file is one view."""

    def __init__(self, manifest: Manifest, name: str) -> None:
        self._manifest, self._name = manifest, name
        self._files: dict[str, Buffer] = {}
        self._array = _create_array(zarr.create_group(MemoryStore(self._files)), name, manifest)

    def encode(self, index: int, view: int, block: np.ndarray) -> bytes:
        """The file of view `view` of shard `index`, from its values (rows of the shard, *tail)."""
        start, stop = self._manifest.shard_rows(index)
        self._array[start:stop, view] = block
        return self._files.pop(self._key(index, view)).to_bytes()

    def decode(self, index: int, view: int, data: bytes) -> np.ndarray:
        """The inverse of `encode`; call it within `refusing`, which catches its errors on damaged bytes."""
        start, stop = self._manifest.shard_rows(index)
        self._files[self._key(index, view)] = cpu.Buffer.from_bytes(data)
        try:
            return np.asarray(self._array[start:stop, view])
        finally:
            del self._files[self._key(index, view)]

    def _key(self, index: int, view: int) -> str:
        key = shard_key(self._name, index, view, self._manifest.arrays[self._name])
        return key.removeprefix(f"{ARRAYS}/")


def _create_array(group: zarr.Group, name: str, manifest: Manifest) -> zarr.Array[Any]:
    spec = manifest.arrays[name]
    return group.create_array(
        name,
        shape=(manifest.images, manifest.array_views(name), *spec.tail),
        shards=(manifest.shard_images, 1, *spec.tail),
        chunks=(spec.chunk_images, 1, *spec.tail),
        dtype=spec.dtype,
        **_COMMON,
    )


@contextmanager
def refusing(damage: UserError) -> Iterator[None]:
    """Raise `damage` instead of the exceptions of Zarr and its codecs on damaged bytes."""
    try:
        yield
    except (ValueError, TypeError, KeyError, RuntimeError, FileNotFoundError) as error:
        raise damage from error
