"""The layout of a cache, and the division of images into shards. A key is a file's path below the cache.

    manifest.json            what the cache was made from (cache/manifest.py)
    image_ids.json           N strings; row i of every array belongs to image i
    arrays/                  one Zarr v3 group
        text_features/       (K, C) float32, unit length
        cls_tokens/          (N, V, C) float16, unnormalised
        dense_tokens/        (N, V, G, G, C) float16 or int8, or (N, V, G, G, K) float16 (cache/dense.py);
                             optional, possibly for the first views only
        dense_scales/        (N, V, G, G) float16, where dense tokens are int8
        pca_mean/            (C,) float32, and
        pca_components/      (K, C) float32, where dense tokens are principal components
        pseudo_labels/       (N, V, G, G) uint8, 255 = annotated
        kmeans_labels/       (N, V, G, G) uint8
        region_tokens/       (N, V, M, C) int8, directions of the pseudo labels' groups, 0 for no group
        views/               (N, V, 5) float32: left, top, right, bottom as fractions of the image, flip 0 or 1
    shards/00000.json        completion record of shard 0 (cache/record.py)
    copies/                  second copies of the above, except the image arrays' values (cache/copies.py)

N images, V views of each, C embedding width, G tokens along a side of the grid, M groups per view at most, K
classes or components. Shard i is the rows [i * S, (i + 1) * S) of every image array; each array keeps view v of it in
one file, arrays/<name>/c.<i>.<v>.0.0...
"""

from math import gcd

from pydantic import BaseModel, PositiveInt

from cache.dense import DENSE_SCALES, DENSE_TOKENS, pca_size

MANIFEST = "manifest.json"
IMAGE_IDS = "image_ids.json"
ARRAYS, SHARDS, COPIES = "arrays", "shards", "copies"
REGION_TOKENS = "region_tokens"
TEXT_FEATURES, PCA_MEAN, PCA_COMPONENTS = "text_features", "pca_mean", "pca_components"  # not of single images


class ArraySpec(BaseModel, frozen=True, extra="forbid"):
    """One image array: its shape is (N, V, *tail), and `chunk_images` images of a shard are compressed together."""

    tail: tuple[int, ...]
    dtype: str
    chunk_images: PositiveInt  # divides the shard's images
    views: PositiveInt | None = None  # only the first so many views are stored; None: all

    def stored_views(self, views: int) -> int:
        """Number of an image's `views` that are stored."""
        return min(views, self.views or views)


def array_specs(
    width: int, grid: int, groups: int, shard_images: int, dense_tokens: str, dense_views: int | None = None
) -> dict[str, ArraySpec]:
    """The image arrays of a cache, for C = `width`, G = `grid` and M = `groups`; dense tokens as cache/dense.py says.

    Dense tokens are read one image at a time, so each image is compressed separately. Region tokens are too, but they
    are small: chunks of up to eight images are read as fast and written five times as fast. The others are read whole.
    UserError if `dense_tokens` asks for C components or more.
    """
    size = pca_size(dense_tokens, width) or width
    specs = {
        "cls_tokens": ArraySpec(tail=(width,), dtype="float16", chunk_images=shard_images),
        "pseudo_labels": ArraySpec(tail=(grid, grid), dtype="uint8", chunk_images=shard_images),
        "kmeans_labels": ArraySpec(tail=(grid, grid), dtype="uint8", chunk_images=shard_images),
        REGION_TOKENS: ArraySpec(tail=(groups, width), dtype="int8", chunk_images=gcd(8, shard_images)),
        "views": ArraySpec(tail=(5,), dtype="float32", chunk_images=shard_images),
    }
    if dense_tokens != "none":
        dtype = "int8" if dense_tokens == "int8" else "float16"
        specs[DENSE_TOKENS] = ArraySpec(tail=(grid, grid, size), dtype=dtype, chunk_images=1, views=dense_views)
    if dense_tokens == "int8":
        specs[DENSE_SCALES] = ArraySpec(tail=(grid, grid), dtype="float16", chunk_images=1, views=dense_views)
    return specs


def record_key(index: int) -> str:
    return f"{SHARDS}/{index:05d}.json"


def shard_key(name: str, index: int, view: int, spec: ArraySpec) -> str:
    """View `view` of shard `index` of array `name`; below arrays/ it is Zarr's own key."""
    return f"{ARRAYS}/{name}/c.{index}.{view}" + ".0" * len(spec.tail)


def copy_key(key: str) -> str:
    return f"{COPIES}/{key}"
