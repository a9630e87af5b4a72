"""Many views at once, in torch: the labels of the path for one view, whatever is in the batch."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import PseudoLabels
from pipeline.pseudo_labels import ANNOTATED, batched, label_batched, label_one_by_one, pseudo_labels
from pipeline.pseudo_labels.batched import kmeans_batched
from pipeline.pseudo_labels.kmeans import direction, kmeans
from tests import reference
from tests.pipeline.draws import MASKS, draw_mask, draw_scene, draw_unit
from tests.reference import Array

Problem = tuple[Array, Array]
Label = Callable[[Tensor, Array, PseudoLabels], tuple[Array, Array]]


def draw_problems(rng: np.random.Generator, width: int = 8) -> list[Problem]:
    """(tokens, seeds) of views that have little in common but their width."""
    tokens, seeds = draw_unit(rng, 150, width, dtype=np.float32), draw_unit(rng, 20, width, dtype=np.float32)
    few = np.concatenate([tokens[:4], -tokens[:4], 0 * tokens[:1]])
    positive = reference.unit(rng.uniform(0.1, 1, (60, width))).astype(np.float32)
    alike = seeds.astype(float)
    alike[1:] = seeds[0] + 1e-15 * rng.normal(size=(19, width))  # as means of the same tokens in another order are
    return [
        (tokens, seeds),
        (tokens, alike),
        (tokens[:1], seeds[:1]),  # one token
        (tokens[:7], seeds),  # fewer than seeds
        (tokens[:20], seeds),  # as many
        (tokens[:21], seeds),  # one more
        (tokens[:90], seeds[:1]),  # one seed
        (tokens[:0], seeds[:0]),  # nothing
        (0 * tokens[:50], 0 * seeds[:5]),  # zeros
        (few[rng.integers(0, 9, 120)], 2 * few[rng.integers(0, 9, 12)]),  # duplicates, opposites
        (tokens[:1].repeat(70, axis=0), tokens[:1].repeat(20, axis=0)),  # identical
        (positive, np.concatenate([-(seeds[:3] ** 2), positive[:4]])),  # empty clusters
    ]


def solve(problems: list[Problem], iterations: int) -> list[Problem]:
    """Labels and centroids of each problem, in one batch."""

    def padded(rows: Sequence[Array]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(part) for part in rows], batch_first=True)

    tokens, seeds = zip(*problems, strict=True)
    seeds = [part.astype(float) for part in seeds]
    counts = [torch.tensor([len(part) for part in rows]) for rows in (tokens, seeds)]
    labels, centroids = kmeans_batched(padded(tokens), counts[0], padded(seeds), counts[1], iterations)
    found = []
    for view, (n, k) in enumerate(zip(*(count.tolist() for count in counts), strict=True)):
        assert (labels[view, n:] == -1).all()
        found.append((labels[view, :n].numpy(), centroids[view, : min(n, k)].numpy()))
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("iterations", [1, 2, 10])
def test_reference(iterations: int, seed: int) -> None:
    problems = draw_problems(np.random.default_rng(seed))
    for (tokens, seeds), (labels, centroids) in zip(problems, solve(problems, iterations), strict=True):
        if len(tokens):
            for expected in (reference.kmeans(tokens, seeds, iterations), kmeans(tokens, seeds, iterations)):
                np.testing.assert_array_equal(labels, expected[0])
                np.testing.assert_allclose(centroids, expected[1], atol=1e-9)


@pytest.mark.parametrize("seed", range(2))
def test_a_view_does_not_depend_on_the_batch(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problems = draw_problems(rng)
    alone = [solve([problem], 10)[0][0] for problem in problems]
    for _ in range(3):
        order = rng.permutation(len(problems))[: rng.integers(2, len(problems) + 1)]
        for index, (labels, _) in zip(order, solve([problems[i] for i in order], 10), strict=True):
            np.testing.assert_array_equal(labels, alone[index])


@pytest.mark.parametrize("length", [0, 1e-12, 1e-8, 3])
def test_what_cancels_out_has_no_direction(length: float) -> None:
    vectors = length * np.array([[0.6, 0.8], [-1, 0]])
    expected = np.sign(max(length - 1e-9, 0)) * np.array([[0.6, 0.8], [-1, 0]])
    np.testing.assert_allclose(direction(vectors), expected, atol=1e-15)
    np.testing.assert_allclose(batched.direction(torch.from_numpy(vectors)), expected, atol=1e-15)


def test_pairs_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = draw_problems(np.random.default_rng(0))
    whole = solve(problems, 10)
    monkeypatch.setattr(batched, "PAIRS", 7)
    for (labels, _), (expected, _) in zip(solve(problems, 10), whole, strict=True):
        np.testing.assert_array_equal(labels, expected)


def test_autocast_and_low_precision_do_not_reach_inside() -> None:
    problems = draw_problems(np.random.default_rng(0))
    whole, before = solve(problems, 10), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = solve(problems, 10)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    for (labels, _), (expected, _) in zip(found, whole, strict=True):
        np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("grid", [32, 9])
def test_views_of_every_kind(grid: int, seed: int) -> None:
    """One batch of all masks: the maps of each view alone, by the way of a GPU and by that of a CPU."""
    rng, config = np.random.default_rng([grid, seed]), PseudoLabels()
    masks = np.stack([draw_mask(kind, grid, rng) for kind in MASKS])
    dense = np.stack([draw_scene(rng, grid, 16, 5, noise=0.1)[0] for _ in masks])
    dense[:, 2] = dense[:, 1]
    dense[:, :, 3] = 0
    tokens = torch.from_numpy(dense)
    found = [label(tokens, masks, config) for label in (pseudo_labels, label_batched)]
    for view in range(len(masks)):
        alone = label_one_by_one(tokens[view : view + 1], masks[view : view + 1], config)
        for maps in found:
            for kind in range(2):
                np.testing.assert_array_equal(maps[kind][view], alone[kind][0], strict=True)


def test_chosen_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for way in ("label_one_by_one", "label_batched"):
        monkeypatch.setattr(f"pipeline.pseudo_labels.{way}", lambda *_, way=way: way)
    for device, way in (("cpu", "label_one_by_one"), ("meta", "label_batched")):
        tokens = torch.ones(1, 2, 2, 4, device=device)
        assert pseudo_labels(tokens, np.ones((1, 2, 2), bool), PseudoLabels()) == way


@pytest.mark.parametrize("label", [label_one_by_one, label_batched])
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_nothing_unannotated(batch: int, label: Label) -> None:
    for part in label(torch.ones(batch, 8, 8, 4), np.zeros((batch, 8, 8), bool), PseudoLabels()):
        assert part.shape == (batch, 8, 8) and part.dtype == np.uint8
        assert (part == ANNOTATED).all()


@pytest.mark.parametrize("label", [label_one_by_one, label_batched])
def test_one_view_with_too_many_seeds_is_refused(label: Label) -> None:
    dense, masks = torch.ones(2, 32, 32, 4), np.zeros((2, 32, 32), bool)
    masks[0, 0], masks[1] = True, True
    with pytest.raises(UserError, match=r"pseudo_labels.windows \[1\] give 256 seeds on a grid of 32"):
        label(dense, masks, PseudoLabels(windows=(1,)))
