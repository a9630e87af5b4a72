"""Recomputes pseudo labels and region tokens from a cache's dense tokens, without running the teacher.

They are written to a new cache, which shares everything else with the one that has the tokens.
"""

import numpy as np
import torch
import zarr

from cache.dense import DENSE_TOKENS
from cache.layout import REGION_TOKENS, array_specs
from cache.manifest import Borrowed, Manifest, different_settings, fingerprint
from cache.reader import Cache, open_cache
from cache.store import name_for, open_store, place_of
from cache.writer import create_cache, list_skipped, pending, relink, write_shard
from configs.errors import UserError
from configs.schema import Config, PseudoLabels
from pipeline.openmp import faiss
from pipeline.pseudo_labels import ANNOTATED, pseudo_labels
from pipeline.pseudo_labels.regions import most_groups, region_tokens
from stages.common.caches import CACHES, split_settings
from stages.common.progress import progress_bar, say

LABELS = ("kmeans_labels", "pseudo_labels")
MADE = (*LABELS, REGION_TOKENS)
KMEANS = "faiss"  # stored tokens are read on the CPU


def recluster(config: Config, source: Cache, target: str | None = None) -> str:
    """Make or complete the cache with labels for `config.pseudo_labels`.

    Labels are computed from the stored tokens, for the views that have them. Neither the teacher, images nor masks are
    read: the existing labels show which tokens are annotated.

    Args:
        source: a cache that has dense tokens, or borrows them.
        target: the folder or URL; by default a folder below `caches/`, named after the fingerprint of the settings.

    Returns:
        The folder or URL of the new cache.

    Raises:
        UserError: there are no dense tokens, or settings other than `pseudo_labels` differ.
    """
    source = _owner(source)
    _check(config, source)
    views = min(config.views.count, source.manifest.array_views(DENSE_TOKENS))
    if views < config.views.count:
        say(f"{source.location} has dense tokens for {views} views: labels are computed for these only")
    path, manifest = _describe(config, source, views, target)
    with open_store(path).lock() as check_lock:
        relink(path, manifest.borrowed)
        manifest = create_cache(path, manifest, source.image_ids, source.text_features)
        shards = pending(path, manifest)
        if not shards:
            say(f"{path} is complete for these settings: nothing to do")
        rows = [manifest.shard_rows(index) for index, _ in shards]
        with progress_bar("pseudo labels", sum(stop - start for start, stop in rows), "images") as advance:
            for index, first_view in shards:
                check_lock()
                advance(make_labels(source, path, manifest, config.pseudo_labels, index, first_view))
        list_skipped(path)
    say(f"cache: {path}, with the tokens of {source.location}")
    return path


def _owner(cache: Cache) -> Cache:
    """The cache that stores the dense tokens of `cache`."""
    if DENSE_TOKENS not in cache.names:
        raise UserError(
            f"{cache.location} has no dense tokens, which new labels need: precompute with --set "
            "storage.dense_tokens=float16, or choose another --cache"
        )
    lender = cache.manifest.borrowed.get(DENSE_TOKENS)
    return cache if lender is None else open_cache(place_of(lender.cache, cache.location))


def _check(config: Config, source: Cache) -> None:
    """UserError unless only `pseudo_labels` differs from what `source` was made from."""
    old, new = source.manifest.settings, split_settings(config.stage_one)[0]
    same = [key for key in new if key != "pseudo_labels"]
    differences = different_settings({key: old.get(key) for key in same}, {key: new[key] for key in same})
    if config.views.count > source.manifest.views:
        differences.append(f"views.count: cache {source.manifest.views}, asked {config.views.count}")
    if differences:
        raise UserError(
            f"--only pseudo-labels keeps all other settings of {source.location} ({'; '.join(differences)}): drop "
            "these settings, or --only"
        )


def _describe(config: Config, source: Cache, views: int, target: str | None) -> tuple[str, Manifest]:
    """The new cache's location and manifest.

    The fingerprint differs from that of a normal cache, as stored tokens are not bit-identical to the teacher's.
    """
    lender = source.manifest
    (width,), (grid, _) = (lender.arrays[name].tail for name in ("cls_tokens", "pseudo_labels"))
    specs = array_specs(width, grid, most_groups(config.pseudo_labels, grid), lender.shard_images, "none")
    settings = {
        **split_settings(config.stage_one)[0],
        "files": {**lender.settings["files"], "dense_tokens": lender.fingerprint},
    }
    path = target or str(CACHES / f"{config.dataset.name}-{fingerprint(settings)[:12]}")
    lent = Borrowed(cache=name_for(source.location, path), fingerprint=lender.fingerprint)
    packages = (faiss, np, zarr)
    return path, Manifest.describe(
        settings=settings,
        versions={**lender.versions, **{package.__name__: package.__version__ for package in packages}},
        image_ids=source.image_ids,
        views=views,
        shard_images=lender.shard_images,
        arrays={name: specs[name] for name in MADE},
        kmeans=KMEANS,
        context=lender.context,
        borrowed={name: lent for name in lender.arrays if name not in MADE},
    )


def make_labels(
    source: Cache, path: str, manifest: Manifest, settings: PseudoLabels, index: int, first_view: int
) -> int:
    """Compute and write the labels of one shard, from view `first_view` on, to the cache at `path`.

    Returns:
        The number of images.
    """
    start, stop = manifest.shard_rows(index)
    views = slice(first_view, manifest.views)
    annotated = source.load_shard("pseudo_labels", index)[:, views] == ANNOTATED
    most, width = manifest.arrays[REGION_TOKENS].tail
    labels = {name: np.full(annotated.shape, ANNOTATED, np.uint8) for name in LABELS}
    regions = np.zeros((*annotated.shape[:2], most, width), np.int8)
    for place in np.flatnonzero(~annotated.all(axis=(1, 2, 3))):
        tokens = torch.from_numpy(source.dense_tokens(start + int(place))[views])
        found = pseudo_labels(tokens, ~annotated[place], settings, KMEANS)
        for name, values in zip(LABELS, found, strict=True):
            labels[name][place] = values
        regions[place] = region_tokens(tokens, found[1], most)
    ids = source.image_ids[start:stop]
    skipped = {name: why for name, why in source.skipped().items() if name in ids}
    write_shard(path, index, first_view, {**labels, REGION_TOKENS: regions}, skipped)
    return stop - start
