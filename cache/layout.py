"""Where everything in a cache lies on disk, and how images fall into shards.

    manifest.json            what the cache was made from (cache/manifest.py)
    image_ids.json           N strings; row i of every array belongs to image i
    arrays/                  one Zarr v3 group
        text_features/       (K, C) float32, unit length
        cls_tokens/          (N, V, C) float16, unnormalised
        dense_tokens/        (N, V, G, G, C) float16, only if asked for
        pseudo_labels/       (N, V, G, G) uint8, 255 = annotated
        kmeans_labels/       (N, V, G, G) uint8
        views/               (N, V, 5) float32: left, top, right, bottom as fractions of the image, flip 0 or 1
    shards/00000.json        completion record of shard 0 (cache/record.py)

N images, V views of each, C embedding width, G tokens along a side of the grid, K classes. Shard i is the rows
[i * S, (i + 1) * S) of every image array; each array keeps it in one file, arrays/<name>/c.<i>.0.0...
"""

from pathlib import Path

from pydantic import BaseModel, PositiveInt

TEXT_FEATURES = "text_features"


class ArraySpec(BaseModel, frozen=True, extra="forbid"):
    """One image array: its shape is (N, V, *tail), and `chunk_images` images of a shard are compressed together."""

    tail: tuple[int, ...]
    dtype: str
    chunk_images: PositiveInt  # divides the shard's images


def array_specs(width: int, grid: int, shard_images: int, dense: bool) -> dict[str, ArraySpec]:
    """The image arrays of a cache, for C = `width` and G = `grid`; with `dense_tokens` if `dense`.

    Dense tokens are read one image at a time, so each image is compressed alone; the others are read whole.
    """
    specs = {
        "cls_tokens": ArraySpec(tail=(width,), dtype="float16", chunk_images=shard_images),
        "pseudo_labels": ArraySpec(tail=(grid, grid), dtype="uint8", chunk_images=shard_images),
        "kmeans_labels": ArraySpec(tail=(grid, grid), dtype="uint8", chunk_images=shard_images),
        "views": ArraySpec(tail=(5,), dtype="float32", chunk_images=shard_images),
    }
    if dense:
        specs["dense_tokens"] = ArraySpec(tail=(grid, grid, width), dtype="float16", chunk_images=1)
    return specs


def manifest_path(cache: Path) -> Path:
    return cache / "manifest.json"


def image_ids_path(cache: Path) -> Path:
    return cache / "image_ids.json"


def arrays_path(cache: Path) -> Path:
    return cache / "arrays"


def shards_path(cache: Path) -> Path:
    return cache / "shards"


def record_path(cache: Path, index: int) -> Path:
    return shards_path(cache) / f"{index:05d}.json"


def shard_key(name: str, index: int, spec: ArraySpec) -> str:
    """Zarr's key of shard `index` of array `name`, which is also its path below arrays/."""
    return f"{name}/c.{index}.0" + ".0" * len(spec.tail)


def shard_path(cache: Path, name: str, index: int, spec: ArraySpec) -> Path:
    return arrays_path(cache) / shard_key(name, index, spec)
