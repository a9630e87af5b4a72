"""Region tokens: the direction of the mean of a group's tokens, in a byte a channel."""

import numpy as np
import pytest
import torch

from configs.schema import PseudoLabels
from pipeline.pseudo_labels import ANNOTATED, pseudo_labels
from pipeline.pseudo_labels.regions import most_groups, region_tokens
from pipeline.pseudo_labels.seeds import window_seeds
from tests import reference
from tests.pipeline.draws import draw_unit
from tests.reference import Array

GRID = 8


def draw_groups(rng: np.random.Generator, batch: int, most: int) -> Array:
    """(B, G, G) uint8 from 0 to `most` - 1, a third of them 255."""
    groups = rng.integers(0, most, (batch, GRID, GRID))
    return np.where(rng.random(groups.shape) < 1 / 3, ANNOTATED, groups).astype(np.uint8)


def draw(seed: int, batch: int = 3, most: int = 5, width: int = 16) -> tuple[torch.Tensor, Array]:
    """Tokens (B, G, G, C) of all lengths, in few directions, and groups (B, G, G)."""
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(batch, GRID, GRID, width)) + 2 * rng.normal(size=width)
    tokens *= rng.exponential(size=(batch, GRID, GRID, 1))
    return torch.from_numpy(tokens.astype(np.float32)), draw_groups(rng, batch, most)


def cosines(codes: Array, exact: Array) -> Array:
    return np.asarray((reference.unit(codes) * reference.unit(exact)).sum(axis=-1))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_reference(seed: int, kind: torch.dtype) -> None:
    """One byte differs at most by the step that it is rounded to, and hardly any does."""
    tokens, groups = draw(seed)
    tokens = tokens.to(kind)
    found = region_tokens(tokens, groups, 7)  # groups 5 and 6 are nowhere
    expected = reference.region_tokens(tokens.double().numpy(), groups, 7)
    assert found.dtype == np.int8 and found.shape == (3, 7, 16)
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01
    assert not found[:, 5:].any() and (np.abs(found[:, :5].astype(int)).max(axis=2) == 127).all()
    np.testing.assert_array_equal(region_tokens(tokens, torch.from_numpy(groups), 7), found)


@pytest.mark.parametrize("outlier", [1, 30])
def test_the_direction_is_kept(outlier: float) -> None:
    """Also of tokens with one channel far larger than the others, as CLIP's have: here with 4/5 of the length."""
    rng = np.random.default_rng(0)
    width, most = 512, 12
    tokens = rng.normal(size=(2, GRID, GRID, width)) * 0.3 + rng.normal(size=width)
    tokens[..., 7] *= 1e-9
    tokens[..., 7] += outlier
    groups = draw_groups(rng, 2, most)
    found = region_tokens(torch.from_numpy(tokens), groups, most)
    exact = np.stack([
        [reference.unit(tokens[view][groups[view] == group]).mean(axis=0) for group in range(most)] for view in range(2)
    ])  # fmt: skip
    assert outlier == 1 or np.median(reference.unit(exact)[..., 7]) > 0.79
    assert cosines(found, exact).min() > (0.999 if outlier > 1 else 0.9999)


def test_a_token_counts_by_its_direction_alone() -> None:
    tokens, groups = draw(0)
    found = region_tokens(tokens, groups, 5)
    np.testing.assert_array_equal(region_tokens(tokens * 2.0**60, groups, 5), found)
    np.testing.assert_array_equal(region_tokens(tokens * 2.0**-60, groups, 5), found)
    longer = tokens * torch.from_numpy(2.0 ** np.random.default_rng(1).integers(-9, 9, (3, GRID, GRID, 1)))
    np.testing.assert_array_equal(region_tokens(longer, groups, 5), found)


def test_views_do_not_know_of_each_other() -> None:
    tokens, groups = draw(1, batch=5)
    groups[2] = ANNOTATED
    found = region_tokens(tokens, groups, 5)
    for view in range(5):
        alone = region_tokens(tokens[view : view + 1], groups[view : view + 1], 5)
        np.testing.assert_array_equal(alone[0], found[view])
    order = [3, 0, 4, 1, 2]
    np.testing.assert_array_equal(region_tokens(tokens[order], groups[order], 5), found[order])


@pytest.mark.parametrize("most", [1, 80, 255])
def test_no_group_gives_zeros(most: int) -> None:
    tokens, groups = draw(2)
    groups[:] = ANNOTATED
    tokens[0, 0, 0] = torch.nan  # of a token that does not count
    assert not region_tokens(tokens, groups, most).any()
    assert region_tokens(tokens[:0], groups[:0], most).shape == (0, most, 16)


def test_one_group_of_the_whole_view_and_one_of_a_single_token() -> None:
    tokens, _ = draw(3, batch=2)
    groups = np.zeros((2, GRID, GRID), np.uint8)
    groups[1] = ANNOTATED
    groups[1, 2, 3] = 4
    found = region_tokens(tokens, groups, 5)
    np.testing.assert_array_equal(found, reference.region_tokens(tokens.numpy(), groups, 5))
    assert found[0, 0].any() and found[1, 4].any() and not found[0, 1:].any() and not found[1, :4].any()
    assert cosines(found[1, 4], tokens[1, 2, 3].double().numpy()) > 0.999


def test_zero_tokens_and_tokens_that_cancel_have_no_direction() -> None:
    tokens, groups = torch.zeros(1, GRID, GRID, 4), np.full((1, GRID, GRID), ANNOTATED, np.uint8)
    groups[0, 0] = 0  # zeros alone
    groups[0, 1], tokens[0, 1, 0] = 1, torch.tensor([0.0, -3.0, 0.0, 1.5])  # zeros and one other: its direction
    groups[0, 2, :6] = 2  # cancel, but for the rounding of sums
    three = draw_unit(np.random.default_rng(0), 3, 4, dtype=np.float32)
    tokens[0, 2, :6] = torch.from_numpy(np.concatenate([three, -8 * three]))
    groups[0, 2, 6:], tokens[0, 2, 6, 0], tokens[0, 2, 7, 0] = 3, -1e-30, -1e30
    with np.errstate(all="raise"):
        found = region_tokens(tokens, groups, 6)[0]
    np.testing.assert_array_equal(found[[0, 2, 4, 5]], 0)
    assert found[1, 1] == -127 and found[1, 3] in (63, 64) and found[1, 0] == found[1, 2] == 0
    np.testing.assert_array_equal(found[3], [-127, 0, 0, 0])


@pytest.mark.parametrize(
    ("grid", "windows"), [(32, (7, 3)), (16, (7, 3)), (8, (3, 2)), (5, (7, 3)), (1, (7, 3)), (4, (1, 40)), (9, (2, 2))]
)
def test_most_groups_is_the_number_of_seeds_where_nothing_is_annotated(grid: int, windows: tuple[int, ...]) -> None:
    everything = torch.ones(1, grid, grid, dtype=torch.bool)
    _, counts = window_seeds(torch.ones(1, grid, grid, 3), everything, windows)
    assert most_groups(PseudoLabels(windows=windows), grid) == int(counts[0])
    assert (grid, windows) != (32, (7, 3)) or int(counts[0]) == 80


def test_most_groups_fit_in_a_label() -> None:
    assert most_groups(PseudoLabels(windows=(1,)), 32) == 255


@pytest.mark.parametrize("kmeans", ["joint", "per-scale"])
def test_pseudo_labels_give_no_more_groups(kmeans: str) -> None:
    """Nor where nothing is fused and every seed keeps tokens."""
    config = PseudoLabels.model_validate({"lambda": 1, "kmeans": kmeans, "windows": (3, 2)})
    tokens = torch.from_numpy(draw_unit(np.random.default_rng(0), 2, GRID, GRID, 32, dtype=np.float32))
    groups = pseudo_labels(tokens, np.ones((2, GRID, GRID), bool), config)[1]
    assert 8 < groups.max() < most_groups(config, GRID) == 4 + 9
    assert region_tokens(tokens, groups, most_groups(config, GRID))[0, groups[0].max()].any()
