"""Multi-scale seeds, Eq. 4."""

import numpy as np
import pytest
import torch

from pipeline.pseudo_labels import seeds as module
from tests import reference
from tests.pipeline.draws import MASKS, draw_mask, draw_unit
from tests.reference import Array

PAPER = (7, 3)


def window_seeds(tokens: Array, unannotated: Array, windows: tuple[int, ...], everything: bool = False) -> Array:
    """Of one view: (G, G, C), (G, G) -> (n, C)."""
    given = torch.from_numpy(np.where(unannotated[..., None] | everything, tokens, 0))[None]
    seeds, counts = module.window_seeds(given, torch.from_numpy(unannotated)[None], windows, everything)
    assert not seeds[0, int(counts[0]) :].any()
    return seeds[0, : int(counts[0])].numpy()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(
    ("grid", "windows"),
    [(32, PAPER), (32, (3, 7)), (16, PAPER), (8, PAPER), (9, (2, 4)), (5, PAPER), (4, (1,)), (3, (40,)), (1, PAPER)],
)
@pytest.mark.parametrize("everything", [False, True])
def test_reference(kind: str, grid: int, windows: tuple[int, ...], everything: bool) -> None:
    rng = np.random.default_rng(grid)
    tokens, unannotated = draw_unit(rng, grid, grid, 6, dtype=np.float32), draw_mask(kind, grid, rng)
    seeds, expected = (f(tokens, unannotated, windows, everything) for f in (window_seeds, reference.window_seeds))
    assert seeds.dtype == np.float32
    assert seeds.shape == expected.shape
    np.testing.assert_allclose(seeds, expected, atol=1e-6)


def test_order_is_windows_then_rows_then_columns() -> None:
    tokens = np.stack(np.meshgrid(np.arange(8.0), np.arange(8.0), indexing="ij"), axis=2).astype(np.float32)
    seeds = window_seeds(tokens, np.ones((8, 8), bool), PAPER)
    np.testing.assert_array_equal(seeds, [[3, 3], [1, 1], [1, 5], [5, 1], [5, 5]])


def test_views_do_not_know_of_each_other() -> None:
    rng = np.random.default_rng(2)
    masks = np.stack([draw_mask(kind, 32, rng) for kind in MASKS])
    tokens = np.where(masks[..., None], draw_unit(rng, len(MASKS), 32, 32, 5, dtype=np.float32), 0)
    seeds, counts = module.window_seeds(torch.from_numpy(tokens), torch.from_numpy(masks), PAPER)
    for view, mask in enumerate(masks):
        alone = window_seeds(tokens[view], mask, PAPER)
        np.testing.assert_array_equal(seeds[view, : int(counts[view])], alone)
        assert not seeds[view, len(alone) :].any()
