"""Views: drawn once, replayed on images and masks; and which tokens a mask leaves unannotated."""

import numpy as np
import pytest
import torch

from configs.schema import Views
from pipeline.data.views import draw_views, majority_tokens, normalise, replay, unannotated_tokens
from tests import reference
from tests.pipeline.draws import draw_classes

WHOLE = np.array([0, 0, 1, 1, 0], np.float32)
FLIPPED = np.array([0, 0, 1, 1, 1], np.float32)


def draw_picture(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("image_id", ["a", "2007_000027", ""])
def test_one_view_is_the_whole_image(image_id: str) -> None:
    views = draw_views(Views(count=1), image_id)
    np.testing.assert_array_equal(views, WHOLE[None], strict=True)


@pytest.mark.parametrize("min_scale", [0.01, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (7, 333), (50, 20)])
def test_random_views_lie_in_the_image(min_scale: float, size: tuple[int, int]) -> None:
    views = np.concatenate([draw_views(Views(count=10, min_scale=min_scale), str(i)) for i in range(40)])
    assert views.shape == (400, 5) and views.dtype == np.float32
    assert views.min() >= 0 and views.max() <= 1
    width, height = views[:, 2] - views[:, 0], views[:, 3] - views[:, 1]
    np.testing.assert_allclose(width, height, atol=1e-6)
    assert (width > min_scale - 1e-6).all() and (width < 1 + 1e-6).all()
    assert 120 < views[:, 4].sum() < 280 and set(views[:, 4]) == {0, 1}
    for view in views[::4]:
        assert replay(view, np.zeros(size, np.uint8), 8).shape == (8, 8)


def test_views_spread_over_the_image() -> None:
    views = np.concatenate([draw_views(Views(count=10, min_scale=0.2), str(i)) for i in range(40)])
    side = views[:, 2] - views[:, 0]
    assert side.min() < 0.22 and side.max() > 0.98
    for near in (views[:, 0], views[:, 1]):
        share = near / np.maximum(1 - side, 1e-6)
        assert share.min() < 0.02 and share.max() > 0.98 and 0.4 < share.mean() < 0.6


def test_views_depend_on_seed_and_image_only() -> None:
    views = draw_views(Views(count=4, seed=1), "a")
    np.testing.assert_array_equal(draw_views(Views(count=4, seed=1, size=64), "a"), views)
    assert not np.isin(draw_views(Views(count=4, seed=2), "a")[:, :4], views[:, :4]).any()
    assert not np.isin(draw_views(Views(count=4, seed=1), "b")[:, :4], views[:, :4]).any()
    assert len(np.unique(views[:, 0])) == 4


def test_views_are_the_same_in_every_process() -> None:
    """A shard that is computed again gets the views it had: nothing may hang on a process's own hashing or clock."""
    expected = [[0.005791, 0.010741, 0.992726, 0.997675, 1], [0.42033, 0.374577, 0.939817, 0.894064, 1]]
    np.testing.assert_allclose(draw_views(Views(count=2), "2007_000027"), expected, atol=1e-6)


@pytest.mark.parametrize("channels", [(), (3,)])
def test_whole_view_at_its_own_size_changes_nothing(channels: tuple[int, ...]) -> None:
    picture = draw_picture(np.random.default_rng(0), 16, 16, *channels)
    np.testing.assert_array_equal(replay(WHOLE, picture, 16), picture, strict=True)
    np.testing.assert_array_equal(replay(FLIPPED, picture, 16), picture[:, ::-1], strict=True)


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize("flip", [0, 1])
def test_a_crop_on_pixels_is_a_slice(flip: int, channels: tuple[int, ...]) -> None:
    """Of an image that is not square: the box's fractions are of the width and of the height."""
    picture = draw_picture(np.random.default_rng(0), 16, 32, *channels)
    view = np.array([0.25, 0.125, 0.5, 0.625, flip], np.float32)
    expected = picture[2:10, 8:16]
    np.testing.assert_array_equal(replay(view, picture, 8), expected[:, ::-1] if flip else expected, strict=True)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("height", "width", "size"), [(200, 120, 64), (90, 250, 96), (100, 100, 200)])
def test_image_and_mask_show_the_recorded_place(height: int, width: int, size: int, seed: int) -> None:
    """Pictures that hold their own coordinates."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    image = np.stack([y, x, x], axis=2)
    for view in draw_views(Views(count=3, seed=seed, min_scale=0.3), "id"):
        left, top, right, bottom, flip = view.astype(float)
        at = (np.arange(size) + 0.5) / size
        rows = np.clip((top + at * (bottom - top)) * height - 0.5, 0, height - 1)
        columns = np.clip((left + at * (right - left)) * width - 0.5, 0, width - 1)
        columns = columns[::-1] if flip else columns
        shown = replay(view, image, size).astype(float)
        assert np.abs(shown[:, :, 0] - rows[:, None]).max() <= 1.01
        assert np.abs(shown[:, :, 1] - columns[None]).max() <= 1.01
        assert np.abs(replay(view, x, size) - columns[None]).max() <= 0.51
        assert np.abs(replay(view, y, size) - rows[:, None]).max() <= 0.51


@pytest.mark.parametrize("view", [WHOLE, FLIPPED, np.array([0.1, 0.2, 0.77, 0.87, 1], np.float32)])
@pytest.mark.parametrize("size", [(1, 1), (37, 5), (64, 64)])
def test_masks_hold_no_invented_classes(size: tuple[int, int], view: np.ndarray) -> None:
    mask = np.where(np.random.default_rng(0).random(size) < 0.5, 255, 7).astype(np.uint8)
    shown = replay(view, mask, 32)
    assert shown.shape == (32, 32) and shown.dtype == np.uint8 and shown.flags.c_contiguous
    assert set(np.unique(shown)) <= set(np.unique(mask))


@pytest.mark.parametrize("batch", [1, 3])
def test_normalise(batch: int) -> None:
    images, mean, std = draw_picture(np.random.default_rng(0), batch, 5, 4, 3), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    pixels = normalise(images, mean, std)
    assert pixels.dtype == torch.float32 and pixels.shape == (batch, 3, 5, 4)
    expected = (images / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(pixels.permute(0, 2, 3, 1), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(normalise(images[:, :, ::-1], mean, std), pixels.flip(3))


@pytest.mark.parametrize("ignored", [0.0, 0.4, 0.5, 0.6, 1.0])
@pytest.mark.parametrize(("size", "grid"), [((32, 32), 8), ((8, 8), 8), ((12, 20), 4), ((21, 9), 3), ((6, 4), 1)])
def test_unannotated_tokens(size: tuple[int, int], grid: int, ignored: float) -> None:
    mask = draw_classes(np.random.default_rng(grid), size, ignored, 9)
    found = unannotated_tokens(mask, grid)
    np.testing.assert_array_equal(found, reference.unannotated_tokens(mask, grid), strict=True)


@pytest.mark.parametrize(("ignored", "expected"), [(7, False), (8, False), (9, True), (16, True)])
def test_half_of_a_token_is_not_over_half(ignored: int, expected: bool) -> None:
    mask = np.arange(16, dtype=np.uint8).reshape(4, 4)
    mask[mask < ignored] = 255
    assert unannotated_tokens(mask, 1).tolist() == [[expected]]


@pytest.mark.parametrize("ignored", [0.0, 0.9, 1.0])
@pytest.mark.parametrize(("size", "grid"), [((32, 32), 8), ((8, 8), 8), ((12, 20), 4), ((6, 4), 1)])
def test_majority_tokens(size: tuple[int, int], grid: int, ignored: float) -> None:
    """Of the classes alone, however many pixels are ignored; ties go to the smallest class."""
    mask = draw_classes(np.random.default_rng(grid), size, ignored, 4)
    found = majority_tokens(mask, grid)
    assert found.shape == (grid, grid) and found.dtype == np.uint8
    for y, x in np.ndindex(grid, grid):
        high, wide = size[0] // grid, size[1] // grid
        block = mask[y * high : (y + 1) * high, x * wide : (x + 1) * wide].ravel().tolist()
        classes = [c for c in block if c != 255]
        assert found[y, x] == (max(sorted(set(classes)), key=classes.count) if classes else 255)
