"""Fused labels F, their way to the features' stride, and the centroids of Eq. 5."""

import numpy as np
import pytest
import torch

from pipeline.learning.labels import at_stride, class_centroids, class_sums, fuse_labels, layout
from tests import reference
from tests.pipeline.draws import draw, draw_classes
from tests.pipeline.learning.gradients import assert_gradients, leaf
from tests.reference import NONE, Array

NUM_SEEN = 5


def assert_fused(seen: Array, groups: Array, num_seen: int = NUM_SEEN) -> tuple[Array, int]:
    """And laid out, for features of a third of the size."""
    tensors, size = (torch.from_numpy(seen), torch.from_numpy(groups)), (-(-seen.shape[1] // 3), -(-seen.shape[2] // 3))
    plan = layout(*tensors, num_seen, size)
    labels = fuse_labels(*tensors, plan.first)
    expected, expected_count = reference.fused_labels(seen, groups, num_seen)
    assert labels.dtype == torch.int64
    np.testing.assert_array_equal(labels, expected)
    assert plan.total == expected_count == num_seen + int(plan.groups.sum())
    present = sorted(set(reference.at_stride(expected, size).flatten().tolist()) - {-1})
    assert plan.rows.tolist() == present
    assert plan.classes == sum(label < num_seen for label in present)
    channels = [*range(num_seen), *(label for label in present if label >= num_seen)]
    assert plan.channels.tolist() == [channels.index(i) if i in channels else -1 for i in range(plan.total)] + [-1]
    return expected, plan.total


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("annotated", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("size", "grid"), [((16, 16), 4), ((16, 8), 4), ((3, 9), 3), ((5, 5), 5), ((7, 2), 1), ((6, 6), 2)]
)
def test_fused(size: tuple[int, int], grid: int, annotated: float, ignored: float, seed: int) -> None:
    """Non-square images have tokens of non-square pixels."""
    rng = np.random.default_rng([seed, *size])
    assert_fused(draw_classes(rng, (3, *size), ignored, NUM_SEEN), draw_classes(rng, (3, grid, grid), annotated, 4))


def test_groups_of_images_are_different_labels() -> None:
    groups = np.array([[[0, 1], [1, 0]], [[NONE] * 2] * 2, [[2, NONE], [2, 2]], [[0, 0], [0, 0]]], np.uint8)
    labels, count = assert_fused(np.full((4, 2, 2), NONE, np.uint8), groups, num_seen=10)
    assert labels.tolist() == [[[10, 11], [11, 10]], [[-1, -1], [-1, -1]], [[14, -1], [14, 14]], [[15, 15], [15, 15]]]
    assert count == 16  # groups 0 and 1 of the third image have no token, and a number all the same


@pytest.mark.parametrize("batch", [1, 16])
def test_255_groups(batch: int) -> None:
    """As many as uint8 allows beside 255; every number above it must survive."""
    groups = np.stack([np.roll(np.arange(256), 7 * b) for b in range(batch)]).reshape(batch, 16, 16).astype(np.uint8)
    labels, count = assert_fused(np.full((batch, 32, 32), NONE, np.uint8), groups, num_seen=156)
    assert count == 156 + 255 * batch
    assert len(np.unique(labels)) == 255 * batch + 1


def test_254_seen_classes() -> None:
    rng = np.random.default_rng(0)
    assert_fused(draw_classes(rng, (2, 32, 32), 0.3, 254), draw_classes(rng, (2, 4, 4), 0.3, 4), num_seen=254)


def test_annotations_win_over_groups() -> None:
    seen = np.array([[[3, NONE], [NONE, 0]]], np.uint8)
    assert assert_fused(seen, np.zeros((1, 1, 1), np.uint8))[0].tolist() == [[[3, 5], [5, 0]]]


@pytest.mark.parametrize(
    ("before", "after"),
    [((16, 16), (4, 4)), ((16, 8), (4, 4)), ((9, 6), (3, 2)), ((7, 7), (2, 2)), ((10, 5), (4, 5)), ((4, 4), (4, 4)),
     ((4, 4), (8, 12)), ((8, 8), (1, 1)), ((512, 512), (128, 128))],
)  # fmt: skip
def test_at_stride(before: tuple[int, int], after: tuple[int, int]) -> None:
    labels = np.random.default_rng(0).integers(-1, 2**40, (2, *before))
    found = at_stride(torch.from_numpy(labels), after)
    np.testing.assert_array_equal(found, reference.at_stride(labels, after), strict=True)


def test_at_stride_takes_the_centre() -> None:
    assert at_stride(torch.arange(16).reshape(1, 4, 4), (2, 2)).tolist() == [[[5, 7], [13, 15]]]
    assert at_stride(torch.arange(9).reshape(1, 3, 3), (1, 1)).tolist() == [[[4]]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("shape", "count"), [((2, 4, 5, 3), 6), ((1, 8, 1, 1), 1), ((3, 2, 4, 4), 300), ((2, 3, 4, 4), 1)]
)
def test_class_centroids(shape: tuple[int, int, int, int], count: int, seed: int) -> None:
    rng = np.random.default_rng([seed, count])
    features, labels = draw(rng, *shape), rng.integers(-1, count, (shape[0], *shape[2:]))
    centroids, present = class_centroids(torch.from_numpy(features), torch.from_numpy(labels), count)
    expected, expected_present = reference.class_centroids(features, labels, count)
    np.testing.assert_allclose(centroids, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(present, expected_present)


@pytest.mark.parametrize("label", [-1, 0, 3])
def test_class_centroids_of_one_label(label: int) -> None:
    """Or of none at all: then nothing is present, and all is zero."""
    features = draw(np.random.default_rng(0), 2, 3, 4, 4)
    centroids, present = class_centroids(torch.from_numpy(features), torch.full((2, 4, 4), label), 4)
    expected = np.zeros((4, 3))
    if label >= 0:
        expected[label] = features.mean(axis=(0, 2, 3))
    np.testing.assert_allclose(centroids, expected, atol=1e-12)
    assert present.tolist() == [i == label for i in range(4)]


def test_class_centroids_gradient() -> None:
    rng = np.random.default_rng(0)
    features, labels, weight = leaf(draw(rng, 2, 3, 4, 4)), rng.integers(-1, 5, (2, 4, 4)), draw(rng, 6, 3)
    plain = torch.zeros((), dtype=torch.float64)
    for label in range(5):
        pixels = [features[b, :, y, x] for b, y, x in np.argwhere(labels == label)]
        plain = plain + (torch.from_numpy(weight[label]) * sum(pixels) / len(pixels)).sum()
    centroids, _ = class_centroids(features, torch.from_numpy(labels), 6)
    assert_gradients((torch.from_numpy(weight) * centroids).sum(), plain, features)


def test_class_sums_of_halves_are_singles() -> None:
    """Where bfloat16 would stop counting at 256."""
    sums, sizes = class_sums(torch.ones(1, 2, 32, 32, dtype=torch.bfloat16), torch.zeros(1, 32, 32).long(), 2)
    assert sums.dtype == torch.float32
    assert sums.tolist() == [[1024, 1024], [0, 0]] and sizes.tolist() == [1024, 0]
