"""Local distillation against the slow reference."""

import numpy as np
import pytest
import torch

from pipeline.learning.labels import fuse_labels
from pipeline.learning.local import region_loss, tokens_of_groups
from tests import reference
from tests.pipeline.draws import draw, draw_classes, draw_unit
from tests.pipeline.learning.gradients import assert_gradients, leaf

KINDS = ["random", "no region", "no direction", "some directions", "zero features"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 2, 1), (5, 8, 3), (40, 16, 7)])
def test_reference(kind: str, shape: tuple[int, int, int]) -> None:
    regions, width, classes = shape
    rng = np.random.default_rng(shape)
    centroids, text = draw(rng, regions, width, scale=3), draw_unit(rng, classes, width)
    tokens = rng.integers(-127, 128, (regions, width)).astype(np.int8)
    if kind == "no region":
        centroids, tokens = centroids[:0], tokens[:0]
    if kind == "no direction":
        tokens[:] = 0
    if kind == "some directions":
        tokens[::2] = 0
    if kind == "zero features":
        centroids[:] = 0
    found = region_loss(*map(torch.from_numpy, (centroids, tokens, text)), 0.3)
    assert found.item() == pytest.approx(reference.region_loss(centroids, tokens, text, 0.3), rel=1e-6, abs=1e-6)


def test_what_it_ignores() -> None:
    """How long features and tokens are, and how far either goes along what all classes have in common."""
    rng = np.random.default_rng(0)
    p, t, text = (torch.from_numpy(a) for a in (draw(rng, 6, 8), draw(rng, 6, 8), draw_unit(rng, 3, 8)))
    common = torch.nn.functional.normalize(text.mean(dim=0), dim=0)
    loss = region_loss(p, t, text, 0.1)
    for other in (7 * p, p + 5 * common):
        torch.testing.assert_close(region_loss(other, t, text, 0.1), loss)
    torch.testing.assert_close(region_loss(p, 3 * t - 2 * common, text, 0.1), loss)
    assert region_loss(2 * t, t, text, 0.1).item() == pytest.approx(0, abs=1e-9)


def test_gradient() -> None:
    """A region whose token has no direction has none, and is no candidate of the others."""
    rng = np.random.default_rng(1)
    p, text = leaf(draw(rng, 4, 6)), torch.from_numpy(draw_unit(rng, 3, 6))
    t = torch.from_numpy(rng.integers(-127, 128, (4, 6)).astype(np.int8))
    t[1] = 0
    common = text.mean(dim=0) / text.mean(dim=0).norm()
    across = torch.eye(6, dtype=torch.float64) - torch.outer(common, common)
    told = [0, 2, 3]
    q, u = p[told] @ across, t[told].double() @ across
    found, wanted = ((a @ u.T) / (a.norm(dim=1)[:, None] * u.norm(dim=1)) / 0.2 for a in (q, u))
    wanted = wanted.softmax(dim=1)
    plain = (wanted * (wanted.log() - found.log_softmax(dim=1))).sum() / 3
    assert_gradients(region_loss(p, t, text, 0.2), plain, p)


def test_features_along_the_common_direction_have_a_finite_gradient() -> None:
    rng = np.random.default_rng(2)
    text = torch.from_numpy(draw_unit(rng, 1, 6)).float()
    p, tokens = text.repeat(3, 1).requires_grad_(), rng.integers(-127, 128, (3, 6)).astype(np.int8)
    loss = region_loss(p, torch.from_numpy(tokens), text, 0.1)
    loss.backward()
    assert loss.isfinite() and p.grad is not None and p.grad.isfinite().all()


@pytest.mark.parametrize("seed", range(4))
def test_tokens_come_in_the_order_of_labels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = draw_classes(rng, (5, 4, 4), 0.4, 4)
    groups[seed % 5] = 255
    tokens = rng.integers(-127, 128, (5, 6, 3)).astype(np.int8)
    _, count = fuse_labels(torch.full((5, 8, 8), 255, dtype=torch.uint8), torch.from_numpy(groups), 2)
    found = tokens_of_groups(torch.from_numpy(tokens), torch.from_numpy(groups))
    expected = [
        tokens[view, group] for view in range(5) for group in range(max([-1, *groups[view][groups[view] < 255]]) + 1)
    ]
    assert len(found) == count - 2
    np.testing.assert_array_equal(found, np.array(expected).reshape(-1, 3))
