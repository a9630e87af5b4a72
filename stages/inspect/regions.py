"""Pictures of pseudo labels, and their quality measured with the hidden true masks."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache.reader import Cache
from configs.errors import UserError
from configs.schema import Config
from pipeline.data.dataset import IGNORE, SegmentationDataset
from pipeline.data.views import majority_tokens, replay
from pipeline.metrics import purity
from pipeline.pictures import contact_sheet, legend, overlay, stacked
from stages.common.caches import check_cache
from stages.common.progress import progress_bar

TITLES = ("image", "seen mask", "K-means regions, own numbers", "fused regions, own numbers", "true mask")


@dataclass(frozen=True)
class PseudoLabelRow:
    """One view. `coverage`: fraction of unannotated, hence pseudo-labelled tokens. Purity is NaN if there are none."""

    image_id: str
    view: int
    clusters: int
    groups: int
    coverage: float
    purity: float


def _count(labels: np.ndarray) -> int:
    return len(np.unique(labels[labels != IGNORE]))


def describe(image_id: str, view: int, clusters: np.ndarray, groups: np.ndarray, truth: np.ndarray) -> PseudoLabelRow:
    """The table row of a view, from labels and true classes (G, G)."""
    coverage = float((groups != IGNORE).mean())
    return PseudoLabelRow(image_id, view, _count(clusters), _count(groups), coverage, purity(groups, truth))


def table(config: Config, cache: Cache, data_root: Path, rows: list[int]) -> list[PseudoLabelRow]:
    """Every view of the chosen images (rows of the training split)."""
    dataset = SegmentationDataset(config.dataset, data_root, "train")
    check_cache(cache, config, dataset)
    groups, clusters, views = (
        cache.load(name, config.views.count) for name in ("pseudo_labels", "kmeans_labels", "views")
    )
    grid, size = groups.shape[2], config.views.size
    found = []
    with progress_bar("inspect", len(rows), "images") as advance:
        for row in rows:
            mask = dataset.mask(row)
            for view in range(views.shape[1]):
                truth = majority_tokens(replay(views[row, view], mask, size), grid)
                found.append(describe(dataset.ids[row], view, clusters[row, view], groups[row, view], truth))
            advance()
    return found


def sheet(config: Config, cache: Cache, data_root: Path, rows: list[int], path: Path) -> Path:
    """Write a contact sheet of the chosen images' first views to `path` (PNG).

    The legend lists the classes in the masks, with a star for unseen ones; regions are numbered separately per image.
    """
    dataset = SegmentationDataset(config.dataset, data_root, "train")
    check_cache(cache, config, dataset)
    size, lines, present = config.views.size, [], set[int]()
    for row in rows:
        image, mask = dataset.pair(row)
        view = cache.read("views", row)[0]
        shown, true_mask = replay(view, image, size), replay(view, mask, size)
        present |= set(np.unique(true_mask).tolist())
        seen_mask = replay(view, np.where(dataset.seen_lookup[mask] == IGNORE, IGNORE, mask).astype(np.uint8), size)
        regions = [_pixels(cache.read(name, row)[0], size) for name in ("kmeans_labels", "pseudo_labels")]
        lines.append([shown, *(overlay(shown, labels) for labels in (seen_mask, *regions, true_mask))])
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {
        index: f"{name}*" if name in config.dataset.unseen else name
        for index, name in enumerate(config.dataset.classes) if index in present
    }  # fmt: skip
    parts = [contact_sheet(lines, TITLES, [dataset.ids[row] for row in rows])]
    stacked([*parts, legend(names)] if names else parts).save(path)
    return path


def _pixels(tokens: np.ndarray, size: int) -> np.ndarray:
    """(G, G) token labels at the size of the view."""
    return tokens.repeat(size // len(tokens), axis=0).repeat(size // len(tokens), axis=1)


def choose_rows(cache: Cache, ids: list[str], count: int, seed: int) -> list[int]:
    """Rows of the named images, or of `count` random ones."""
    unknown = [name for name in ids if name not in cache.image_ids]
    if unknown:
        raise UserError(f"cache {cache.location} holds no image {unknown[0]!r}: ids look like {cache.image_ids[0]!r}")
    rows = [cache.image_ids.index(name) for name in ids]
    for row in rows:
        if row not in cache.kept_rows:
            raise UserError(f"image {cache.image_ids[row]!r} was left out of {cache.location}: it could not be read")
    kept = cache.kept_rows
    return rows or sorted(np.random.default_rng(seed).choice(kept, min(count, len(kept)), replace=False).tolist())


def summary(rows: list[PseudoLabelRow]) -> dict[str, float]:
    """Means over the views; purity over those that have unannotated tokens, each weighted by how many."""
    weight = np.array([row.coverage for row in rows])
    known = np.array([row.purity for row in rows])
    valid = ~np.isnan(known)
    return {
        "clusters": float(np.mean([row.clusters for row in rows])),
        "groups": float(np.mean([row.groups for row in rows])),
        "coverage": float(weight.mean()),
        "purity": float(np.average(known[valid], weights=weight[valid])) if valid.any() else float("nan"),
        "views_without_unannotated_token": float(np.sum(weight == 0)),
    }
