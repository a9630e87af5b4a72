"""Chooses the cache a command works on, and checks that it matches the command's settings."""

from pathlib import Path
from typing import Any

from cache.manifest import Manifest, different_settings
from cache.reader import Cache, find_caches, open_cache
from configs.errors import UserError
from configs.load import as_settings, merge
from configs.schema import Config, StageOne
from pipeline.data.dataset import SegmentationDataset

CACHES = Path("caches")


def choose_cache(cache: str | None, dataset: str | None) -> Cache:
    """The cache at this path or URL, or the newest complete one below caches/ (of `dataset`, if it is named)."""
    if cache is not None:
        return open_cache(cache)
    for opened in find_caches(CACHES):
        if dataset is None or opened.manifest.settings["dataset"]["name"] == dataset:
            return opened
    wanted = f" --dataset {dataset}" if dataset else ""
    raise UserError(f"no complete cache in {CACHES}/: run precompute{wanted} first, or choose one with --cache")


def split_settings(config: StageOne) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split stage one's settings: those that determine a cache's content, and the rest (file locations, other splits).

    A cache stays valid if its dataset moves or gets another test split. The number of views does not change the content
    of a view either: a cache with too few views is extended, and its manifest stores their number.
    """
    content = as_settings(config)
    del content["views"]["count"]
    dataset = content["dataset"]
    train = dict(dataset["splits"].get("train", {}))
    count = train.pop("count", None)
    rest = {key: dataset.pop(key) for key in ("root", "generator", "splits", "unseen_splits")}
    rest["splits"] = {**rest["splits"], "train": {"count": count}}
    dataset["splits"] = {"train": train}
    return content, {"dataset": rest}


def cached_settings(manifest: Manifest) -> dict[str, Any]:
    """The settings of a cache, as the base for `resolve`."""
    settings = {key: value for key, value in manifest.settings.items() if key != "files"}
    return merge(merge(settings, manifest.context), {"views": {"count": manifest.views}})


def check_cache(cache: Cache, config: Config, dataset: SegmentationDataset) -> None:
    """Reject a cache that was made from other settings or images than `config` and `dataset`, or lacks views.

    Raises:
        UserError: lists every differing setting.
    """
    made_from = {key: value for key, value in cache.manifest.settings.items() if key != "files"}
    differences = different_settings(made_from, split_settings(config.stage_one)[0])
    if cache.manifest.views < config.views.count:
        differences.append(f"views.count: cache {cache.manifest.views}, asked {config.views.count}")
    if differences:
        raise UserError(
            f"cache {cache.location} has other settings ({'; '.join(differences)}): precompute with yours, or drop them"
        )
    if cache.image_ids != dataset.ids or cache.manifest.settings["files"]["dataset"] != dataset.digest():
        raise UserError(
            f"cache {cache.location} was made from other images or masks than those in {dataset.root}: precompute "
            "again, or correct --data-root"
        )
