"""Arrays to Zarr's bytes, in memory.

Zarr writes a file without fsync, leaves *.partial files when killed, and merges a shard with what it finds on disk.
So it never writes to disk here: it encodes into a dictionary, and cache/files.py puts the bytes in place.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import zarr
from zarr.codecs import ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from cache.layout import TEXT_FEATURES, shard_key
from cache.manifest import Manifest

_COMMON: dict[str, Any] = {
    # The checksum lets a read of a single image notice flipped bits. Float16 tokens shrink by 8 % at any level.
    "compressors": ZstdCodec(level=1, checksum=True),
    # All files of an array in one directory, so that one fsync makes their names last.
    "chunk_key_encoding": {"name": "default", "separator": "."},
    # Otherwise a chunk that is all zeros is left out, and cannot be told from one that was lost.
    "config": {"write_empty_chunks": True},
}


def encode_metadata(manifest: Manifest, text_features: np.ndarray) -> Iterator[tuple[str, bytes]]:
    """(path below arrays/, bytes) of all the files of a cache without shards: the zarr.json files, text features."""
    files: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(files))
    for name in manifest.arrays:
        _create_array(group, name, manifest)
    group.create_array(TEXT_FEATURES, data=text_features, chunks=text_features.shape, **_COMMON)
    return ((key, buffer.to_bytes()) for key, buffer in sorted(files.items()))


def encode_shard(manifest: Manifest, name: str, index: int, block: np.ndarray) -> memoryview:
    """The file of shard `index` of array `name`, from its values (rows of the shard, V, *tail)."""
    files: dict[str, Buffer] = {}
    array = _create_array(zarr.create_group(MemoryStore(files)), name, manifest)
    start, stop = manifest.shard_rows(index)
    array[start:stop] = block
    return memoryview(files[shard_key(name, index, manifest.arrays[name])].as_buffer_like())


def _create_array(group: zarr.Group, name: str, manifest: Manifest) -> zarr.Array[Any]:
    spec = manifest.arrays[name]
    return group.create_array(
        name,
        shape=(manifest.images, manifest.views, *spec.tail),
        shards=(manifest.shard_images, manifest.views, *spec.tail),
        chunks=(spec.chunk_images, manifest.views, *spec.tail),
        dtype=spec.dtype,
        **_COMMON,
    )
