"""Stage two's samples: the recorded views in an order that only the seed decides."""

import colorsys
from itertools import product

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pipeline.data.training import TrainingViews
from pipeline.data.views import normalise
from tests.pipeline.data.trees import AMONG_SEEN, Tree
from tests.reference import NONE, Array

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
HEIGHT, WIDTH, SIZE = 16, 32, 8
IMAGES, VIEWS = 4, 3
PAIRS = set(product(range(IMAGES), range(VIEWS)))


def exact_views(rng: np.random.Generator) -> tuple[Array, Array]:
    """(N, V, 5) views whose boxes begin and end between pixels and show SIZE of them; and their (top, left)."""
    top = rng.integers(0, HEIGHT - SIZE + 1, (IMAGES, VIEWS))
    left = rng.integers(0, WIDTH - SIZE + 1, (IMAGES, VIEWS))
    flip = rng.integers(0, 2, (IMAGES, VIEWS))
    box = [left / WIDTH, top / HEIGHT, (left + SIZE) / WIDTH, (top + SIZE) / HEIGHT, flip]
    return np.stack(box, axis=2).astype(np.float32), np.stack([top, left], axis=2)


def training_views(tree: Tree, views: Array, samples: int = 40, seed: int = 0) -> TrainingViews:
    return TrainingViews(tree.read(), views, SIZE, samples, seed, MEAN, STD)


@pytest.fixture
def pairs(tree: Tree) -> list[tuple[Array, Array]]:
    return tree.fill(np.random.default_rng(0), IMAGES, HEIGHT, WIDTH)


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("seed", [0, 7])
def test_every_epoch_is_a_permutation_of_all_views(seed: int, tree: Tree) -> None:
    samples = training_views(tree, exact_views(np.random.default_rng(0))[0], samples=40, seed=seed)
    assert len(samples) == 40
    order = [(samples[d]["row"], samples[d]["view"]) for d in range(40)]
    epochs = [order[start : start + 12] for start in range(0, 36, 12)]
    for epoch in epochs:
        assert set(epoch) == PAIRS and len(epoch) == len(PAIRS)
    assert len({tuple(epoch) for epoch in [*epochs, sorted(PAIRS)]}) == 4
    assert len(set(order[36:])) == 4
    others = training_views(tree, exact_views(np.random.default_rng(0))[0], seed=seed + 1)
    assert [(others[d]["row"], others[d]["view"]) for d in range(12)] != order[:12]


def test_the_recorded_view_is_shown(tree: Tree, pairs: list[tuple[Array, Array]]) -> None:
    """Image and seen mask, cropped and flipped by hand; the view is of the row named."""
    views, corners = exact_views(np.random.default_rng(1))
    assert 0 < views[..., 4].sum() < IMAGES * VIEWS
    samples = training_views(tree, views)
    samples._distort = torch.nn.Identity()  # type: ignore[assignment]
    for d in range(12):
        sample = samples[d]
        row, view = sample["row"], sample["view"]
        top, left = corners[row, view]
        image, mask = (part[top : top + SIZE, left : left + SIZE] for part in pairs[row])
        if views[row, view, 4]:
            image, mask = image[:, ::-1], mask[:, ::-1]
        seen = np.array([[AMONG_SEEN.get(int(true), NONE) for true in line] for line in mask], np.uint8)
        np.testing.assert_array_equal(sample["seen"], seen, strict=True)
        torch.testing.assert_close(sample["pixels"], normalise(image[None].copy(), MEAN, STD)[0])


@pytest.mark.usefixtures("pairs")
def test_distortion_leaves_the_mask_alone(tree: Tree) -> None:
    views = exact_views(np.random.default_rng(1))[0]
    samples, plain = training_views(tree, views, 240), training_views(tree, views, 240)
    plain._distort = torch.nn.Identity()  # type: ignore[assignment]
    changed, looks = 0, set()
    for d in range(0, 240, 2):
        shown, expected = samples[d], plain[d]
        assert torch.equal(shown["seen"], expected["seen"])
        assert shown["pixels"].shape == (3, SIZE, SIZE) and shown["pixels"].dtype == torch.float32
        changed += not torch.equal(shown["pixels"], expected["pixels"])
        looks.add(shown["pixels"].numpy().tobytes())
    assert 90 <= changed < 120 and len(looks) > changed  # each kind half the time, anew in each epoch


def test_distortion_keeps_the_hue(tree: Tree) -> None:
    """Within 18 degrees, as mmsegmentation's: red may become orange, never green or blue."""
    for row in range(IMAGES):
        tree.add(str(row), np.full((HEIGHT, WIDTH, 3), (200, 60, 60), np.uint8), np.zeros((HEIGHT, WIDTH), np.uint8))
    samples = training_views(tree, exact_views(np.random.default_rng(0))[0])
    for d in range(40):
        red, green, blue = (samples[d]["pixels"][:, 0, 0].numpy() * STD + MEAN).tolist()
        hue = 360 * colorsys.rgb_to_hsv(red, green, blue)[0]
        assert min(hue, 360 - hue) < 20


@pytest.mark.usefixtures("pairs")
def test_a_sample_depends_on_seed_and_number_only(tree: Tree) -> None:
    """Not on what was drawn before, not on torch's generator, which stays as it was, not on the workers."""
    views = exact_views(np.random.default_rng(2))[0]
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    samples = training_views(tree, views, samples=20, seed=3)
    expected = [samples[d] for d in range(20)]
    assert torch.equal(torch.random.get_rng_state(), state)

    torch.manual_seed(2)
    again = training_views(tree, views, samples=500, seed=3)
    for d in (19, 0, 13, 12, 11, 5, 5):
        sample = again[d]
        assert (sample["row"], sample["view"]) == (expected[d]["row"], expected[d]["view"])
        assert torch.equal(sample["pixels"], expected[d]["pixels"])
    other = training_views(tree, views, samples=20, seed=4)
    assert not all(torch.equal(other[d]["pixels"], expected[d]["pixels"]) for d in range(20))

    for workers in (0, 2):
        context = "spawn" if workers else None
        batches = list(DataLoader(samples, batch_size=3, num_workers=workers, multiprocessing_context=context))
        assert [len(batch["row"]) for batch in batches] == [3] * 6 + [2]
        for key in ("pixels", "seen", "row", "view"):
            joined = torch.cat([batch[key] for batch in batches])
            one = [sample[key] for sample in expected]  # type: ignore[literal-required]
            assert torch.equal(joined, torch.stack([torch.as_tensor(value) for value in one]))


@pytest.mark.usefixtures("pairs")
def test_no_samples(tree: Tree) -> None:
    samples = training_views(tree, exact_views(np.random.default_rng(0))[0], samples=0)
    assert len(samples) == 0 and list(DataLoader(samples, batch_size=2)) == []
