"""Stage two's samples: the recorded views in an order that only the seed decides."""

import colorsys
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from configs.schema import Views
from pipeline.data import training
from pipeline.data.training import TrainingViews, distort
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
    return TrainingViews(tree.read(), np.array(rows), views, SIZE, samples, seed, MEAN, STD)


@pytest.fixture
def undistorted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "distort", lambda image: image)


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
        torch.testing.assert_close(sample["pixels"], normalise(image[None].copy(), MEAN, STD)[0])


@pytest.mark.usefixtures("undistorted")
def test_rows_are_those_of_the_views_and_of_the_split(tree: Tree, pairs: list[tuple[Array, Array]]) -> None:
    """Also where images before them are left out."""
    views, corners = exact_views(np.random.default_rng(1))
    samples = training_views(tree, views, rows=(1, 3))
    for d in range(6):
        sample = samples[d]
        (top, left), flip = corners[sample["row"], sample["view"]], views[sample["row"], sample["view"], 4]
        image = pairs[sample["row"]][0][top : top + SIZE, left : left + SIZE]
        expected = normalise((image[:, ::-1] if flip else image)[None].copy(), MEAN, STD)[0]
        torch.testing.assert_close(sample["pixels"], expected)


@pytest.mark.usefixtures("pairs")
def test_padding_has_no_class_and_no_colour(tree: Tree) -> None:
    """A view twice as large as the image, its corner at the image's; some are mirrored, padding is never distorted."""
    views = np.tile(np.array([0, 0, 2, 2, 0], np.float32), (IMAGES, VIEWS, 1))
    views[:, 1:, 4] = 1
    samples, half = training_views(tree, views), SIZE // 2
    for d in range(12):
        sample = samples[d]
        seen, pixels = sample["seen"], sample["pixels"]
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
        assert samples[d]["pixels"].shape == (3, SIZE, SIZE) and samples[d]["seen"].shape == (SIZE, SIZE)


@pytest.mark.usefixtures("pairs")
def test_distortion_leaves_the_mask_alone(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    views = exact_views(np.random.default_rng(1))[0]
    samples = training_views(tree, views, 240)
    shown = [samples[d] for d in range(0, 240, 2)]
    monkeypatch.setattr(training, "distort", lambda image: image)
    changed, looks = 0, set()
    for sample, d in zip(shown, range(0, 240, 2), strict=True):
        plain = samples[d]
        assert torch.equal(sample["seen"], plain["seen"])
        assert sample["pixels"].shape == (3, SIZE, SIZE) and sample["pixels"].dtype == torch.float32
        changed += not torch.equal(sample["pixels"], plain["pixels"])
        looks.add(sample["pixels"].numpy().tobytes())
    assert 100 <= changed < 120 and len(looks) > changed  # 15 in 16, anew in each epoch


# --- photometric distortion, mmsegmentation's PhotoMetricDistortion ---


def plain(*colour: int) -> Tensor:
    return torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, 2, 2).contiguous()


def looks(image: Tensor, times: int) -> Array:
    """(times, 3) colours that a plain image takes."""
    torch.manual_seed(0)
    found = []
    for _ in range(times):
        out = distort(image)
        assert out.shape == image.shape and out.dtype == torch.uint8
        assert (out == out[:, :1, :1]).all()
        found.append(out[:, 0, 0].numpy())
    return np.array(found)


Calls = list[list[tuple[str, float]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Of 2000 distortions of mid-grey: what each asked of torchvision, none of which is done, and ("added", n)."""
    asked: Calls = []

    def note(self: v2.Transform, function: Callable[..., Tensor], image: Tensor, **options: Any) -> Tensor:
        (factor,) = options.values()
        asked[-1].append((function.__name__, factor))
        return image

    monkeypatch.setattr(v2.Transform, "_call_kernel", note)
    torch.manual_seed(1)
    for _ in range(2000):
        asked.append([])
        added = distort(plain(128, 128, 128)).to(torch.int16) - 128
        assert (added == added[0, 0, 0]).all()
        asked[-1].append(("added", float(added[0, 0, 0])))
    return asked


RANGES = {
    "adjust_brightness": (0.5, 1.5),  # torchvision's is mmsegmentation's contrast: a factor of all pixels
    "adjust_saturation": (0.5, 1.5),
    "adjust_hue": (-0.1, 0.1),  # 18 of OpenCV's 180
}


@pytest.mark.parametrize("part", RANGES)
def test_each_part_is_applied_half_the_time(part: str, calls: Calls) -> None:
    """Once at most, by a factor that is uniform in its range."""
    factors = [[factor for name, factor in call if name == part] for call in calls]
    assert {len(found) for found in factors} == {0, 1}
    values = np.sort([factor for found in factors for factor in found])
    assert 900 < len(values) < 1100
    low, high = RANGES[part]
    assert low <= values[0] < low + 0.02 * (high - low) and high - 0.02 * (high - low) < values[-1] <= high
    distance = np.abs((values - low) / (high - low) - np.arange(len(values)) / len(values)).max()
    assert distance < 2 / np.sqrt(len(values))


def test_brightness_is_added_half_the_time(calls: Calls) -> None:
    values = np.array([call[-1][1] for call in calls])
    assert all(call[-1][0] == "added" for call in calls)
    assert values.min() >= -32 and values.max() <= 32 and values.min() <= -30 and values.max() >= 30
    assert 900 < (values != 0).sum() < 1100
    assert abs(values[values != 0].mean()) < 2 and 17 < values[values != 0].std() < 20  # uniform: 18.5


def test_parts_do_not_hang_together(calls: Calls) -> None:
    """All 16 subsets, equally often; contrast before both of the others or behind them, each half the time."""
    names = [[name for name, _ in call[:-1]] for call in calls]
    subsets: dict[tuple[bool, ...], int] = {}
    for found, call in zip(names, calls, strict=True):
        key = (*(part in found for part in RANGES), call[-1][1] != 0)
        subsets[key] = subsets.get(key, 0) + 1
    assert len(subsets) == 16 and min(subsets.values()) > 80 and max(subsets.values()) < 180
    for other in ("adjust_saturation", "adjust_hue"):
        both = [found for found in names if "adjust_brightness" in found and other in found]
        first = sum(found.index("adjust_brightness") < found.index(other) for found in both)
        assert 0.4 * len(both) < first < 0.6 * len(both)
    for found in names:
        if {"adjust_saturation", "adjust_hue"} <= set(found):
            assert found.index("adjust_saturation") < found.index("adjust_hue")
        if len(found) == 3:
            assert found.index("adjust_brightness") != 1


def test_brightness_and_contrast_of_grey() -> None:
    """Grey has no hue and no saturation: (100 +- 32) x 0.5-1.5, untouched a quarter of the time."""
    found = looks(plain(100, 100, 100), 1500)
    assert (np.ptp(found, axis=1) <= 1).all()
    values = found[:, 0].astype(int)
    assert 33 <= values.min() < 40 and 185 < values.max() <= 198
    assert 0.2 < (abs(values - 100) <= 1).mean() < 0.32


def test_bounds_of_colour() -> None:
    """Black and white are clipped, not wrapped around; black is moved by brightness alone, never by a factor."""
    black, white = looks(plain(0, 0, 0), 600), looks(plain(255, 255, 255), 600)
    assert black.max() <= 48 and black.max() > 40  # 32 x 1.5
    assert white.min() >= 111 and (white > 200).mean() > 0.4


def test_hue_turns_by_a_tenth_of_the_circle_at_most() -> None:
    """Red may become orange or pink, never green or blue; no other part changes a hue."""
    turns = []
    for red, green, blue in looks(plain(150, 50, 50), 800) / 255:
        hue, saturation, _ = colorsys.rgb_to_hsv(red, green, blue)
        if saturation > 0.15:  # 8 bits a channel tell the hue of greyish colours badly
            turns.append(360 * ((hue + 0.5) % 1 - 0.5))
    found = np.array(turns)
    assert len(found) > 600 and np.abs(found).max() < 36 + 4
    assert found.min() < -31 and found.max() > 31
    assert 0.4 < (np.abs(found) < 1.5).mean() < 0.65


def test_saturation_moves_towards_grey_or_away() -> None:
    """Chroma, which brightness leaves, is multiplied by up to 1.5 x 1.5 and down to 0.5 x 0.5."""
    chroma = np.ptp(looks(plain(120, 100, 80), 1500).astype(int), axis=1)
    assert 8 <= chroma.min() <= 15 and 80 <= chroma.max() <= 92
    assert 0.2 < (np.abs(chroma - 40) <= 1).mean() < 0.36


def test_distortion_leaves_its_input() -> None:
    image = torch.arange(48, dtype=torch.uint8).reshape(3, 4, 4)
    before = image.clone()
    torch.manual_seed(0)
    for _ in range(40):
        distort(image)
    assert torch.equal(image, before)


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
