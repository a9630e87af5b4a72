"""Seeds, K-means and fusion together: the pseudo labels of one view, by both K-means."""

from typing import Any, Literal

import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.schema import PseudoLabels
from pipeline.pseudo_labels import ANNOTATED, kmeans_on, pseudo_labels
from pipeline.pseudo_labels.kmeans import KMEANS
from tests import reference
from tests.pipeline.draws import MASKS, draw_mask, draw_scene
from tests.reference import Array

BOTH = pytest.mark.parametrize("kmeans", KMEANS)


def label(dense: Array, unannotated: Array, config: PseudoLabels, kmeans: str) -> tuple[Array, Array]:
    """(G, G, C), (G, G) -> clusters, groups (G, G), which are sound."""
    clusters, groups = pseudo_labels(torch.from_numpy(dense)[None], unannotated[None], config, kmeans)
    assert_sound(clusters[0], groups[0], unannotated)
    return clusters[0], groups[0]


def assert_reference(dense: Array, unannotated: Array, config: PseudoLabels, kmeans: str) -> None:
    expected = reference.pseudo_labels(
        dense, unannotated, config.windows, config.iterations, config.threshold, config.seed_tokens == "all",
        config.kmeans == "per-scale",
    )  # fmt: skip
    for found, wanted in zip(label(dense, unannotated, config, kmeans), expected, strict=True):
        np.testing.assert_array_equal(found, wanted, strict=True)


def assert_sound(clusters: Array, groups: Array, unannotated: Array) -> None:
    """Labels where and only where nothing is annotated; each cluster in one group; groups without gaps."""
    for labels in (clusters, groups):
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels != ANNOTATED, unannotated)
    for cluster in np.unique(clusters[unannotated]):
        assert len(np.unique(groups[clusters == cluster])) == 1
    assert np.unique(groups[unannotated]).tolist() == list(range(len(np.unique(groups[unannotated]))))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("grid", [1, 6, 14, 32])
@pytest.mark.parametrize(
    "settings",
    [{}, {"lambda": 0.2, "windows": (2,)}, {"seed_tokens": "all"}, {"kmeans": "per-scale"},
     {"seed_tokens": "all", "kmeans": "per-scale"}],
)  # fmt: skip
def test_all_readings(settings: dict[str, Any], grid: int, kind: str) -> None:
    rng = np.random.default_rng(grid)
    config = PseudoLabels(iterations=5, **settings)
    drawn = [rng.normal(0, 9, (grid, grid, 8)).astype(np.float32)]
    if grid > 1:
        drawn.append(draw_scene(rng, grid, 16, 4, noise=0.3)[0])
    for dense in drawn:
        unannotated = draw_mask(kind, grid, rng)
        assert_reference(dense, unannotated, config, "torch")
        label(dense, unannotated, config, "faiss")


@BOTH
def test_seeds_of_all_scales_together_must_fit(kmeans: str) -> None:
    """49 + 225 of them, each K-means' own below 256."""
    dense, unannotated = np.ones((30, 30, 4), np.float32), np.ones((30, 30), bool)
    for windows in ((3,), (1,)):
        label(dense, unannotated, PseudoLabels(windows=windows, kmeans="per-scale"), kmeans)
    with pytest.raises(UserError, match="give 274 seeds"):
        label(dense, unannotated, PseudoLabels(windows=(3, 1), kmeans="per-scale"), kmeans)
    with pytest.raises(UserError, match=r"pseudo_labels.windows \[1\] give 256 seeds on a grid of 32"):
        label(np.ones((32, 32, 4), np.float32), np.ones((32, 32), bool), PseudoLabels(windows=(1,)), kmeans)


@BOTH
@pytest.mark.parametrize("reading", ["joint", "per-scale"])
@pytest.mark.parametrize("seed", range(4))
def test_scenes(seed: int, reading: Literal["joint", "per-scale"], kmeans: str) -> None:
    """So much noise that no cluster runs empty: FAISS, too, gives what the reference does."""
    rng = np.random.default_rng(seed)
    dense, _ = draw_scene(rng, 32, 64, 5, noise=0.5)
    assert_reference(dense, draw_mask("dense", 32, rng), PseudoLabels(kmeans=reading), kmeans)


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.5])
def test_faiss_and_torch_agree(noise: float) -> None:
    """In groups on all scenes; in clusters where none runs empty, as with much noise. At 0.1 lambda is a close call."""
    config, agreed = PseudoLabels(), []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        dense, unannotated = draw_scene(rng, 32, 64, 5, noise)[0], draw_mask("dense", 32, rng)
        pairs = zip(*(label(dense, unannotated, config, kmeans) for kmeans in KMEANS), strict=True)
        agreed.append([reference.adjusted_rand(one[unannotated], other[unannotated]) for one, other in pairs])
    clusters, groups = np.transpose(agreed)
    assert groups.mean() >= 0.99 and groups.min() >= (0.95 if noise == 0.1 else 0.99)
    assert clusters.min() >= (0.99 if noise == 0.5 else 0.6)


@BOTH
@pytest.mark.parametrize("seed", range(4))
def test_objects_become_groups(seed: int, kmeans: str) -> None:
    """Objects that look alike inside and unlike each other: fusion undoes the splitting into 80 clusters."""
    rng = np.random.default_rng(seed)
    dense, owner = draw_scene(rng, 32, 64, 4, noise=0.02)
    unannotated = draw_mask("dense", 32, rng)
    groups = label(dense, unannotated, PseudoLabels(), kmeans)[1]
    pairs = set(zip(groups[unannotated].tolist(), owner[unannotated].tolist(), strict=True))
    shown = len(np.unique(owner[unannotated]))
    assert len(pairs) == shown == len({group for group, _ in pairs})


@BOTH
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_identical_tokens(kind: str, value: float, kmeans: str) -> None:
    """Of any cluster, but of one group; zero tokens are like nothing, which must not be an error."""
    dense, unannotated = np.full((32, 32, 8), value, np.float32), draw_mask(kind, 32, np.random.default_rng(0))
    groups = label(dense, unannotated, PseudoLabels(), kmeans)[1]
    if value:
        assert set(groups[unannotated]) <= {0}


def test_clusters_that_end_empty_join_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Centroids at 25, 0 and 50 degrees: the first, which both others are near, has no token."""
    radians = np.deg2rad([25, 0, 50])
    centroids = np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)
    labels = np.array([1, 2, 2, 1])
    monkeypatch.setitem(KMEANS, "faiss", lambda *_: [(labels, centroids)])
    clusters, groups = label(centroids[labels].reshape(2, 2, 2), np.ones((2, 2), bool), PseudoLabels(), "faiss")
    assert clusters.tolist() == [[1, 2], [2, 1]]
    assert groups.tolist() == [[0, 1], [1, 0]]


@BOTH
def test_annotated_tokens_take_no_part(kmeans: str) -> None:
    rng = np.random.default_rng(3)
    dense, unannotated = rng.normal(size=(32, 32, 8)).astype(np.float32), draw_mask("half", 32, rng)
    other = np.where(unannotated[..., None], dense, rng.normal(size=dense.shape).astype(np.float32))
    other[~unannotated] *= np.nan
    found, expected = (label(tokens, unannotated, PseudoLabels(), kmeans) for tokens in (other, dense))
    np.testing.assert_array_equal(found, expected)


@BOTH
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_tokens_that_are_not_finite_are_refused(value: float, everything: bool, kmeans: str) -> None:
    dense, unannotated = np.ones((4, 4, 8), np.float32), np.arange(16).reshape(4, 4) < 12
    config = PseudoLabels(seed_tokens="all" if everything else "unannotated")
    dense[0 if everything else 3, 3, 0] = value
    dense[3, 3, 0] = value
    if not everything:
        label(dense, unannotated, config, kmeans)
        dense[0, 1, 2] = value
    with pytest.raises(UserError, match="not finite"):
        label(dense, unannotated, config, kmeans)


@BOTH
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("grid", [32, 9])
def test_a_view_does_not_depend_on_the_batch(grid: int, seed: int, kmeans: str) -> None:
    """One batch of all masks: the maps of each view alone. Some tokens are alike, some zero."""
    rng, config = np.random.default_rng([grid, seed]), PseudoLabels()
    masks = np.stack([draw_mask(kind, grid, rng) for kind in MASKS])
    dense = np.stack([draw_scene(rng, grid, 16, 5, noise=0.1)[0] for _ in masks])
    dense[:, 2] = dense[:, 1]
    dense[:, :, 3] = 0
    found = pseudo_labels(torch.from_numpy(dense), masks, config, kmeans)
    for view, mask in enumerate(masks):
        np.testing.assert_array_equal([maps[view] for maps in found], label(dense[view], mask, config, kmeans))


@BOTH
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_nothing_unannotated(batch: int, kmeans: str) -> None:
    nothing = np.zeros((batch, 8, 8), bool)
    for part in pseudo_labels(torch.ones(batch, 8, 8, 4), nothing, PseudoLabels(), kmeans):
        assert part.shape == (batch, 8, 8) and part.dtype == np.uint8
        assert (part == ANNOTATED).all()


def test_chosen_by_device() -> None:
    assert [kmeans_on(device) for device in ("cpu", "cuda", "cuda:1")] == ["faiss", "torch", "torch"]
    rng = np.random.default_rng(0)  # clusters run empty, so that the two differ
    dense, unannotated = draw_scene(rng, 32, 16, 5, noise=0.02)[0], np.ones((32, 32), bool)
    (own,), _ = pseudo_labels(torch.from_numpy(dense)[None], unannotated[None], PseudoLabels())
    faiss, other = (label(dense, unannotated, PseudoLabels(), kmeans)[0] for kmeans in ("faiss", "torch"))
    np.testing.assert_array_equal(own, faiss)
    assert (faiss != other).any()


@BOTH
@pytest.mark.parametrize("seed", range(3))
def test_some_zero_tokens(seed: int, kmeans: str) -> None:
    rng = np.random.default_rng(seed)
    dense, unannotated = rng.normal(size=(32, 32, 8)).astype(np.float32), draw_mask("half", 32, rng)
    dense[rng.random((32, 32)) < 0.3] = 0
    label(dense, unannotated, PseudoLabels(), kmeans)
