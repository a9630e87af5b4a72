"""Seeds, K-means and fusion together: the pseudo labels of one view, by both ways."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.schema import PseudoLabels
from pipeline.pseudo_labels import ANNOTATED, label_batched, label_one_by_one
from tests import reference
from tests.pipeline.draws import MASKS, draw_mask, draw_scene
from tests.reference import Array

EmptyClusters = Callable[[], int]


def pseudo_labels(dense: Array, unannotated: Array, config: PseudoLabels) -> tuple[Array, Array]:
    """(G, G, C), (G, G) -> clusters, groups (G, G): the same by FAISS and by the way of a GPU."""
    batch = torch.from_numpy(dense)[None], unannotated[None], config
    one, batched = label_one_by_one(*batch), label_batched(*batch)
    for kind in range(2):
        np.testing.assert_array_equal(one[kind], batched[kind], strict=True)
    return one[0][0], one[1][0]


def assert_reference(dense: Array, unannotated: Array, config: PseudoLabels) -> None:
    clusters, groups = pseudo_labels(dense, unannotated, config)
    expected = reference.pseudo_labels(
        dense, unannotated, config.windows, config.iterations, config.threshold, config.seed_tokens == "all",
        config.kmeans == "per-scale",
    )  # fmt: skip
    np.testing.assert_array_equal(clusters, expected[0], strict=True)
    np.testing.assert_array_equal(groups, expected[1], strict=True)


def assert_sound(clusters: Array, groups: Array, unannotated: Array) -> None:
    """Labels where and only where nothing is annotated; each cluster in one group; groups without gaps."""
    for labels in (clusters, groups):
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels != ANNOTATED, unannotated)
    for cluster in np.unique(clusters[unannotated]):
        assert len(np.unique(groups[clusters == cluster])) == 1
    assert np.unique(groups[unannotated]).tolist() == list(range(len(np.unique(groups[unannotated]))))


@pytest.mark.parametrize("threshold", [0.2, 0.8])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("grid", "windows"), [(32, (7, 3)), (14, (7, 3)), (6, (2,)), (1, (3,))])
def test_random_tokens(grid: int, windows: tuple[int, ...], kind: str, threshold: float) -> None:
    rng = np.random.default_rng(grid)
    dense, unannotated = rng.normal(0, 9, (grid, grid, 8)).astype(np.float32), draw_mask(kind, grid, rng)
    config = PseudoLabels(windows=windows, iterations=5, **{"lambda": threshold})
    assert_reference(dense, unannotated, config)
    assert_sound(*pseudo_labels(dense, unannotated, config), unannotated)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("grid", [1, 6, 14, 32])
@pytest.mark.parametrize(
    "settings", [{"seed_tokens": "all"}, {"kmeans": "per-scale"}, {"seed_tokens": "all", "kmeans": "per-scale"}]
)
def test_other_readings(settings: dict[str, Any], grid: int, kind: str) -> None:
    rng = np.random.default_rng(grid)
    config = PseudoLabels(iterations=5, **settings)
    drawn = [rng.normal(0, 9, (grid, grid, 8)).astype(np.float32)]
    if grid > 1:
        drawn.append(draw_scene(rng, grid, 16, 4, noise=0.3)[0])
    for dense in drawn:
        unannotated = draw_mask(kind, grid, rng)
        assert_reference(dense, unannotated, config)
        assert_sound(*pseudo_labels(dense, unannotated, config), unannotated)


def test_seeds_of_all_scales_together_must_fit() -> None:
    """49 + 225 of them, each K-means' own below 256."""
    dense, unannotated = np.ones((30, 30, 4), np.float32), np.ones((30, 30), bool)
    for windows in ((3,), (1,)):
        pseudo_labels(dense, unannotated, PseudoLabels(windows=windows, kmeans="per-scale"))
    with pytest.raises(UserError, match="give 274 seeds"):
        pseudo_labels(dense, unannotated, PseudoLabels(windows=(3, 1), kmeans="per-scale"))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("windows", "noise"), [((3,), 0.3), ((7,), 0.2)])
def test_scenes(windows: tuple[int, ...], noise: float, seed: int, empty_clusters: EmptyClusters) -> None:
    rng = np.random.default_rng(seed)
    dense, _ = draw_scene(rng, 32, 16, 5, noise)
    assert_reference(dense, draw_mask("dense", 32, rng), PseudoLabels(windows=windows))
    assert empty_clusters() == 0


@pytest.mark.parametrize("seed", range(4))
def test_split_clusters(seed: int, empty_clusters: EmptyClusters) -> None:
    rng = np.random.default_rng(seed)
    dense, unannotated = draw_scene(rng, 32, 8, 5, noise=0.1)[0], draw_mask("dense", 32, rng)
    assert_reference(dense, unannotated, PseudoLabels(iterations=4))
    assert empty_clusters() > 0


@pytest.mark.parametrize("seed", range(4))
def test_objects_become_groups(seed: int) -> None:
    """Objects that look alike inside and unlike each other: fusion undoes the splitting into 80 clusters."""
    rng = np.random.default_rng(seed)
    dense, owner = draw_scene(rng, 32, 64, 4, noise=0.02)
    unannotated = draw_mask("dense", 32, rng)
    groups = pseudo_labels(dense, unannotated, PseudoLabels())[1]
    pairs = set(zip(groups[unannotated].tolist(), owner[unannotated].tolist(), strict=True))
    shown = len(np.unique(owner[unannotated]))
    assert len(pairs) == shown == len({group for group, _ in pairs})


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_identical_tokens(kind: str, value: float) -> None:
    """Of any cluster, but of one group; zero tokens are like nothing, which must not be an error."""
    dense, unannotated = np.full((32, 32, 8), value, np.float32), draw_mask(kind, 32, np.random.default_rng(0))
    clusters, groups = pseudo_labels(dense, unannotated, PseudoLabels())
    assert_sound(clusters, groups, unannotated)
    if value:
        assert set(groups[unannotated]) <= {0}


@pytest.mark.parametrize("seed", range(3))
def test_some_zero_tokens(seed: int) -> None:
    rng = np.random.default_rng(seed)
    dense, unannotated = rng.normal(size=(32, 32, 8)).astype(np.float32), draw_mask("half", 32, rng)
    dense[rng.random((32, 32)) < 0.3] = 0
    assert_sound(*pseudo_labels(dense, unannotated, PseudoLabels()), unannotated)


def test_clusters_that_end_empty_join_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Centroids at 25, 0 and 50 degrees: the first, which both others are near, has no token."""
    radians = np.deg2rad([25, 0, 50])
    centroids = np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)
    labels = np.array([1, 2, 2, 1])
    monkeypatch.setattr("pipeline.pseudo_labels.kmeans", lambda *_: (labels, centroids))
    dense = torch.from_numpy(centroids[labels]).reshape(1, 2, 2, 2)
    clusters, groups = label_one_by_one(dense, np.ones((1, 2, 2), bool), PseudoLabels())
    assert clusters.tolist() == [[[1, 2], [2, 1]]]
    assert groups.tolist() == [[[0, 1], [1, 0]]]


def test_annotated_tokens_take_no_part() -> None:
    rng = np.random.default_rng(3)
    dense, unannotated = rng.normal(size=(32, 32, 8)).astype(np.float32), draw_mask("half", 32, rng)
    other = np.where(unannotated[..., None], dense, rng.normal(size=dense.shape).astype(np.float32))
    for found, expected in zip(
        pseudo_labels(other, unannotated, PseudoLabels()),
        pseudo_labels(dense, unannotated, PseudoLabels()),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)


def test_length_of_tokens_does_not_matter() -> None:
    rng = np.random.default_rng(4)
    dense, unannotated = draw_scene(rng, 32, 16, 5, noise=0.1)[0], draw_mask("dense", 32, rng)
    scaled = dense * rng.choice([0.25, 1, 8], (32, 32, 1)).astype(np.float32)
    for found, expected in zip(
        pseudo_labels(scaled, unannotated, PseudoLabels()),
        pseudo_labels(dense, unannotated, PseudoLabels()),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_tokens_that_are_not_finite_are_refused(value: float) -> None:
    dense, unannotated = np.ones((4, 4, 8), np.float32), np.arange(16).reshape(4, 4) < 12
    dense[3, 3, 0] = value
    assert (pseudo_labels(dense, unannotated, PseudoLabels())[0][unannotated] != ANNOTATED).all()
    dense[0, 1, 2] = value
    with pytest.raises(UserError, match="not finite"):
        pseudo_labels(dense, unannotated, PseudoLabels())
