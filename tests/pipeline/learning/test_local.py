"""Local distillation against the slow reference."""

import numpy as np
import pytest
import torch

from pipeline.learning.labels import group_counts
from pipeline.learning.local import region_loss, tokens_of_groups
from tests import reference
from tests.pipeline.draws import draw, draw_classes
from tests.pipeline.learning.gradients import assert_gradients, leaf

KINDS = ["random", "no region", "no direction", "some directions", "zero features", "one token"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("regions", "width"), [(1, 2), (5, 8), (40, 16)])
def test_reference(kind: str, regions: int, width: int) -> None:
    rng = np.random.default_rng(regions)
    centroids = draw(rng, regions, width, scale=3)
    tokens = rng.integers(-127, 128, (regions, width)).astype(np.int8)
    if kind == "no region":
        centroids, tokens = centroids[:0], tokens[:0]
    if kind == "no direction":
        tokens[:] = 0
    if kind == "some directions":
        tokens[::2] = 0
    if kind == "zero features":
        centroids[:] = 0
    if kind == "one token":
        tokens[:] = tokens[0]
    found = region_loss(torch.from_numpy(centroids), torch.from_numpy(tokens), 0.3)
    assert found.item() == pytest.approx(reference.region_loss(centroids, tokens, 0.3), rel=1e-6, abs=1e-9)


def test_gradient() -> None:
    """A region whose token has no direction has none, and is no candidate of the others."""
    rng = np.random.default_rng(1)
    p, t = leaf(draw(rng, 4, 6)), torch.from_numpy(rng.integers(-127, 128, (4, 6)).astype(np.int8))
    t[1] = 0
    q, u = p[[0, 2, 3]], t[[0, 2, 3]].double()
    cosines = (q @ u.T) / (q.norm(dim=1)[:, None] * u.norm(dim=1))
    assert_gradients(region_loss(p, t, 0.2), -(cosines / 0.2).log_softmax(dim=1).diagonal().mean(), p)


@pytest.mark.parametrize("seed", range(4))
def test_tokens_come_in_the_order_of_labels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = draw_classes(rng, (5, 4, 4), 0.4, 4)
    groups[seed % 5] = 255
    tokens = rng.integers(-127, 128, (5, 6, 3)).astype(np.int8)
    counts = group_counts(torch.from_numpy(groups))
    found = tokens_of_groups(torch.from_numpy(tokens), counts)
    expected = [
        tokens[view, group] for view in range(5) for group in range(max([-1, *groups[view][groups[view] < 255]]) + 1)
    ]
    assert len(found) == counts.sum()
    np.testing.assert_array_equal(found, np.array(expected).reshape(-1, 3))
