"""What the gallery shows of each view: picture and labels, and the data for fusing regions again in the page."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cache.dense import DENSE_TOKENS
from cache.reader import Cache
from configs.schema import Config
from pipeline.data.dataset import IGNORE, SegmentationDataset
from pipeline.data.views import majority_tokens, replay
from pipeline.pseudo_labels.fusion import fuse, similarities
from pipeline.pseudo_labels.kmeans import direction, unit_length
from stages.common.caches import check_cache
from stages.inspect.regions import PseudoLabelRow, describe


@dataclass(frozen=True)
class Regions:
    """The k K-means regions of a view, in the order of their labels, computed from the dense tokens.

    Attributes:
        similarity: (k, k) float64, as used by fusion.
        lengths: (k,) float64, length of the sum of each region's unit-length tokens.
        text: (k, K) float64, cosines of the regions' centroids with the text features.
        same: whether fusing them at the cache's lambda gives the cache's groups.
    """

    similarity: np.ndarray
    lengths: np.ndarray
    text: np.ndarray
    same: bool


@dataclass(frozen=True)
class View:
    """One view of an image.

    Attributes:
        row: its line of the table.
        picture: (S, S, 3) uint8.
        mask: (S, S) uint8, true class indices, IGNORE where none is known.
        truth: (G, G) uint8, the commonest class of each token.
        clusters, groups: (G, G) uint8 as cached, IGNORE for annotated tokens.
        seeds: (window, how many of its places gave a seed) of each window of pseudo_labels.windows, in the order of the
            K-means labels; empty where every token is a region of its own.
        regions: None if the view has no dense tokens, or with one K-means per scale.
    """

    row: PseudoLabelRow
    picture: np.ndarray
    mask: np.ndarray
    truth: np.ndarray
    clusters: np.ndarray
    groups: np.ndarray
    seeds: list[tuple[int, int]]
    regions: Regions | None


def collect(config: Config, cache: Cache, data_root: Path, rows: Sequence[int]) -> Iterator[View]:
    """Every view of the chosen images (rows of the training split), one after the other.

    Raises:
        UserError: the cache is of other settings or images, or a file is damaged.
    """
    dataset = SegmentationDataset(config.dataset, data_root, "train")
    check_cache(cache, config, dataset)
    size, dense = config.views.size, DENSE_TOKENS in cache.names
    joint = config.pseudo_labels.kmeans == "joint"  # otherwise a region's tokens do not determine its centroid
    for row in rows:
        image, mask = dataset.pair(row)
        groups, clusters, views = (cache.read(name, row) for name in ("pseudo_labels", "kmeans_labels", "views"))
        tokens = cache.dense_tokens(row) if dense else np.empty(0)
        for view, geometry in enumerate(views):
            shown = replay(geometry, mask, size)
            truth = majority_tokens(shown, groups.shape[1])
            regions = None
            if view < len(tokens) and joint:
                regions = find_regions(
                    tokens[view], clusters[view], groups[view], cache.text_features, config.pseudo_labels.threshold
                )
            yield View(
                row=describe(dataset.ids[row], view, clusters[view], groups[view], truth),
                picture=replay(geometry, image, size),
                mask=shown,
                truth=truth,
                clusters=clusters[view],
                groups=groups[view],
                seeds=count_seeds(groups[view] != IGNORE, config.pseudo_labels.windows) if joint else [],
                regions=regions,
            )


def find_regions(
    tokens: np.ndarray, clusters: np.ndarray, groups: np.ndarray, text_features: np.ndarray, threshold: float
) -> Regions:
    """Regions from dense tokens (G, G, C), labels (G, G) and class features (K, C).

    A centroid is the mean of its region's unit-length tokens, as in a K-means that has converged. Stage one's centroids
    can differ, as dense tokens are stored with less precision, and K-means may have stopped earlier. `same` tells
    whether that changes the groups.
    """
    unannotated = clusters != IGNORE
    alive, index = np.unique(clusters[unannotated], return_inverse=True)
    sums = np.zeros((len(alive), tokens.shape[-1]))
    np.add.at(sums, index, unit_length(torch.from_numpy(tokens[unannotated])).numpy().astype(np.float64))
    centroids = direction(torch.from_numpy(sums)).numpy()
    fused = fuse(centroids, np.ones(len(alive)), threshold)
    return Regions(
        similarity=similarities(centroids),
        lengths=np.linalg.norm(sums, axis=1),
        text=centroids @ text_features.T.astype(np.float64),
        same=bool(np.array_equal(fused[index], groups[unannotated])),
    )


def count_seeds(unannotated: np.ndarray, windows: Sequence[int]) -> list[tuple[int, int]]:
    """View.seeds, from unannotated tokens (G, G) bool.

    As in pipeline/pseudo_labels/seeds.py (Eq. 4), windows without an unannotated token give no seed.
    """
    grid = len(unannotated)
    found = []
    for window in windows:
        size = min(window, grid)
        starts = range(0, grid - size + 1, window + 1)
        places = [unannotated[y : y + size, x : x + size] for y in starts for x in starts]
        found.append((window, sum(bool(place.any()) for place in places)))
    return found if unannotated.sum() > sum(count for _, count in found) > 0 else []
