"""Stage two's samples: the recorded views in an order that only the seed decides."""

from itertools import product

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from configs.schema import Views
from pipeline.data import training
from pipeline.data.training import TrainingViews
from pipeline.data.views import draw_views, normalise
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


def training_views(
    tree: Tree, views: Array, samples: int = 40, seed: int = 0, rows: tuple[int, ...] = tuple(range(IMAGES))
) -> TrainingViews:
    return TrainingViews(tree.read(), np.array(rows), views, SIZE, samples, seed, MEAN)


@pytest.fixture
def undistorted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "distort", lambda image, how: image)


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


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("rows", [(0, 2, 3), (1,), (3, 1)])
def test_rows_left_out_never_appear(rows: tuple[int, ...], tree: Tree) -> None:
    """Their files may even be gone. Rows keep their numbers, which are those of the cache."""
    for row in set(range(IMAGES)) - set(rows):
        tree.image_path(str(row)).write_text("broken")
        tree.mask_path(str(row)).write_text("broken")
    samples = training_views(tree, exact_views(np.random.default_rng(0))[0], samples=40, rows=rows)
    kept = set(product(rows, range(VIEWS)))
    order = [(samples[d]["row"], samples[d]["view"]) for d in range(40)]
    for start in range(0, 40 - len(kept), len(kept)):
        assert set(order[start : start + len(kept)]) == kept
    assert set(order) == kept and len(samples) == 40


@pytest.mark.usefixtures("undistorted")
def test_the_recorded_view_is_shown(tree: Tree, pairs: list[tuple[Array, Array]]) -> None:
    """Image and seen mask, cropped and flipped by hand; the view is of the row named."""
    views, corners = exact_views(np.random.default_rng(1))
    assert 0 < views[..., 4].sum() < IMAGES * VIEWS
    samples = training_views(tree, views)
    for d in range(12):
        sample = samples[d]
        row, view = sample["row"], sample["view"]
        top, left = corners[row, view]
        image, mask = (part[top : top + SIZE, left : left + SIZE] for part in pairs[row])
        if views[row, view, 4]:
            image, mask = image[:, ::-1], mask[:, ::-1]
        seen = np.array([[AMONG_SEEN.get(int(true), NONE) for true in line] for line in mask], np.uint8)
        np.testing.assert_array_equal(sample["seen"], seen, strict=True)
        np.testing.assert_array_equal(sample["pixels"], image, strict=True)


@pytest.mark.usefixtures("undistorted")
def test_rows_are_those_of_the_views_and_of_the_split(tree: Tree, pairs: list[tuple[Array, Array]]) -> None:
    """Also where images before them are left out."""
    views, corners = exact_views(np.random.default_rng(1))
    samples = training_views(tree, views, rows=(1, 3))
    for d in range(6):
        sample = samples[d]
        (top, left), flip = corners[sample["row"], sample["view"]], views[sample["row"], sample["view"], 4]
        image = pairs[sample["row"]][0][top : top + SIZE, left : left + SIZE]
        np.testing.assert_array_equal(sample["pixels"], image[:, ::-1] if flip else image, strict=True)


@pytest.mark.usefixtures("pairs")
def test_padding_has_no_class_and_no_colour(tree: Tree) -> None:
    """A view twice as large as the image, its corner at the image's; some are mirrored, padding is never distorted."""
    views = np.tile(np.array([0, 0, 2, 2, 0], np.float32), (IMAGES, VIEWS, 1))
    views[:, 1:, 4] = 1
    samples, half = training_views(tree, views), SIZE // 2
    for d in range(12):
        sample = samples[d]
        seen, pixels = sample["seen"], normalise(sample["pixels"][None], MEAN, STD)[0]
        for part in (np.s_[half:], np.s_[:, half:]):
            assert (seen[part] == NONE).all()
        assert pixels[:, half:].abs().max() < 0.02 and pixels[:, :, half:].abs().max() < 0.02
        assert (seen[:half, :half] != NONE).any() and pixels[:, :half, :half].abs().max() > 0.3


@pytest.mark.usefixtures("pairs")
def test_drawn_views_go_with_the_images(tree: Tree) -> None:
    dataset = tree.read()
    settings = Views(size=SIZE, count=VIEWS)
    views = np.stack([draw_views(settings, i, dataset.training_pair(row)[1]) for row, i in enumerate(dataset.ids)])
    samples = training_views(tree, views)
    for d in range(12):
        assert samples[d]["pixels"].shape == (SIZE, SIZE, 3) and samples[d]["seen"].shape == (SIZE, SIZE)


@pytest.mark.usefixtures("pairs")
def test_distortion_leaves_the_mask_alone(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    views = exact_views(np.random.default_rng(1))[0]
    samples = training_views(tree, views, 240)
    shown = [samples[d] for d in range(0, 240, 2)]
    monkeypatch.setattr(training, "distort", lambda image, how: image)
    changed, looks = 0, set()
    for sample, d in zip(shown, range(0, 240, 2), strict=True):
        plain = samples[d]
        np.testing.assert_array_equal(sample["seen"], plain["seen"], strict=True)
        assert sample["pixels"].shape == (SIZE, SIZE, 3) and sample["pixels"].dtype == np.uint8
        changed += not np.array_equal(sample["pixels"], plain["pixels"])
        looks.add(sample["pixels"].tobytes())
    assert 100 <= changed < 120 and len(looks) > changed  # 15 in 16, anew in each epoch


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
        np.testing.assert_array_equal(sample["pixels"], expected[d]["pixels"])
    other = training_views(tree, views, samples=20, seed=4)
    assert not all(np.array_equal(other[d]["pixels"], expected[d]["pixels"]) for d in range(20))

    for workers in (0, 2):
        context = "spawn" if workers else None
        batches = list(DataLoader(samples, batch_size=3, num_workers=workers, multiprocessing_context=context))
        assert [len(batch["row"]) for batch in batches] == [3] * 6 + [2]
        for key in ("pixels", "seen", "row", "view"):
            joined = torch.cat([batch[key] for batch in batches])
            one = [sample[key] for sample in expected]  # type: ignore[literal-required]
            assert torch.equal(joined, torch.stack([torch.as_tensor(value) for value in one]))


@pytest.mark.usefixtures("pairs")
def test_region_tokens_are_those_of_row_and_view_where_they_are_asked_for(tree: Tree) -> None:
    views, _ = exact_views(np.random.default_rng(1))
    stored = np.random.default_rng(2).integers(-127, 128, (IMAGES, VIEWS, 6, 4), np.int8)
    asked = TrainingViews(
        tree.read(), np.array([1, 3]), views, SIZE, 12, 0, MEAN, region_tokens=lambda row, view: stored[row, view]
    )
    plain = training_views(tree, views, rows=(1, 3))
    for d in range(12):
        sample = dict(asked[d])
        np.testing.assert_array_equal(sample.pop("region_tokens"), stored[sample["row"], sample["view"]], strict=True)
        assert sample.keys() == plain[d].keys() and all(np.array_equal(sample[key], plain[d][key]) for key in sample)  # type: ignore[literal-required]
    (batch,) = DataLoader(asked, batch_size=12)
    assert batch["region_tokens"].shape == (12, 6, 4) and batch["region_tokens"].dtype == torch.int8


@pytest.mark.usefixtures("pairs")
def test_no_samples(tree: Tree) -> None:
    samples = training_views(tree, exact_views(np.random.default_rng(0))[0], samples=0)
    assert len(samples) == 0 and list(DataLoader(samples, batch_size=2)) == []
