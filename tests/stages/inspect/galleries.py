"""Galleries of random views, and what they are made of."""

from pathlib import Path

import numpy as np

from configs.load import resolve
from pipeline.data.dataset import IGNORE
from stages.inspect.gallery.collect import View, find_regions
from stages.inspect.gallery.write import write_gallery
from stages.inspect.regions import describe
from tests import reference

VIEWS, WIDTH, THRESHOLD = 50, 6, 0.8
ODD_IDS = ['a <b> & "c"', "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\u2028 \udc80", "é/ß"]


def draw_tokens(rng: np.random.Generator, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (G, G, C) and K-means labels (G, G) with gaps in their numbers; some views are degenerate."""
    grid = int(rng.choice([4, 8, 12]))
    k = int(rng.integers(2, 40))
    clusters = rng.choice(255, k, replace=False)[rng.integers(0, k, (grid, grid))].astype(np.uint8)
    clusters[rng.random((grid, grid)) < 0.3] = IGNORE
    centres = rng.normal(size=(5, WIDTH))[rng.integers(0, 5, 255)] + 0.4 * rng.normal(size=(255, WIDTH))
    if number % 5 == 1:  # equal similarities: the order of merging is decided by ties
        centres = rng.integers(-1, 2, (255, WIDTH)).astype(float)
    tokens = centres[np.minimum(clusters, 254)]
    if number % 5 == 2:
        tokens += 0.3 * rng.normal(size=tokens.shape)
    if number == 3:
        clusters[:] = IGNORE
    if number == 4:
        clusters[:] = 7
    if number == 5:
        tokens[:] = 0
    return tokens.astype(np.float32), clusters


def reference_centroids(tokens: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """(k, C), of the labels that occur, ascending."""
    found = []
    for label in sorted({*clusters.ravel().tolist()} - {IGNORE}):
        total = np.zeros(WIDTH)
        for token in tokens[clusters == label]:
            total += (token / (np.sqrt((token.astype(float) ** 2).sum()) or 1)).astype(np.float32)
        length = np.sqrt((total**2).sum())
        found.append(total / length if length > 1e-9 else np.zeros(WIDTH))
    return np.array(found).reshape(-1, WIDTH)


def expand(clusters: np.ndarray, group_of: np.ndarray) -> np.ndarray:
    """Groups (G, G) of the tokens."""
    groups = np.full(clusters.shape, IGNORE, np.uint8)
    for label, group in zip(sorted({*clusters.ravel().tolist()} - {IGNORE}), group_of, strict=True):
        groups[clusters == label] = group
    return groups


class Made:
    """Random views, what they are made of, and the gallery of them."""

    def __init__(self, folder: Path, with_tokens: int = VIEWS, views: int = VIEWS, kmeans: str = "joint") -> None:
        """`with_tokens`: how many of the views, the first ones, have dense tokens."""
        words = "dataset.prompts={clouds: {any: [cumulus, haze, mist]}}"  # each word has a name of its own in the page
        self.config = resolve("scenes", assignments=[f"pseudo_labels.kmeans={kmeans}", words])
        self.hidden = [self.config.dataset.classes.index(name) for name in self.config.dataset.unseen]
        rng = np.random.default_rng(0)
        self.text = rng.normal(size=(len(self.config.dataset.channels), WIDTH))
        self.text = (self.text / np.linalg.norm(self.text, axis=1, keepdims=True)).astype(np.float32)
        self.tokens, self.clusters, self.views = [], [], list[View]()
        for number in range(views):
            tokens, clusters = draw_tokens(rng, number)
            grid = len(clusters)
            groups = self.fused(tokens, clusters, THRESHOLD)
            truth = rng.integers(0, len(self.config.dataset.classes), 3)[rng.integers(0, 3, clusters.shape)].astype(
                np.uint8
            )
            truth[rng.random(clusters.shape) < 0.2] = IGNORE
            regions = find_regions(tokens, clusters, groups, self.text, THRESHOLD)
            picture = rng.integers(0, 256, (grid * 4, grid * 4, 3), dtype=np.uint8)
            image_id = ODD_IDS[number] if number < len(ODD_IDS) else f"image-{number}"
            self.tokens.append(tokens)
            self.clusters.append(clusters)
            self.views.append(
                View(
                    row=describe(image_id, 0, clusters, groups, truth),
                    picture=picture,
                    mask=truth.repeat(4, axis=0).repeat(4, axis=1),
                    truth=truth,
                    clusters=clusters,
                    groups=groups,
                    seeds=[(7, 100), (3, 155)],
                    regions=regions if number < with_tokens else None,
                )
            )
        self.page = write_gallery(self.config, "caches/<i>odd</i>", self.views, folder)

    @staticmethod
    def fused(tokens: np.ndarray, clusters: np.ndarray, threshold: float) -> np.ndarray:
        centroids = reference_centroids(tokens, clusters)
        return expand(clusters, reference.fuse(centroids, np.ones(len(centroids)), threshold))
