"""Views: drawn once, replayed on images and masks; and which tokens a mask leaves unannotated."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from configs.schema import Views
from pipeline.data.views import (
    draw_views,
    inside,
    majority_tokens,
    normalise,
    padding_colour,
    replay,
    unannotated_tokens,
)
from tests import reference
from tests.pipeline.draws import draw_classes
from tests.reference import NONE, Array

WHOLE = np.array([0, 0, 1, 1, 0], np.float32)
FLIPPED = np.array([0, 0, 1, 1, 1], np.float32)
SHAPES = [(50, 20), (64, 64), (7, 333), (1, 1), (3, 200), (1, 5000), (700, 900), (33, 1)]


def draw_picture(rng: np.random.Generator, *shape: int) -> Array:
    return rng.integers(0, 256, shape).astype(np.uint8)


def unlabelled(height: int, width: int) -> Array:
    return np.full((height, width), NONE, np.uint8)


# --- ZegCLIP's crop in slow NumPy, from its description: a resized image, an integer corner, the 75 % rule. ---


class Crop(NamedTuple):
    """A crop in pixels of the resized image."""

    width: int
    height: int
    left: int
    top: int
    flip: bool


def resized_side(side: int, height: int, width: int, size: int, ratio: float) -> int:
    """The short side becomes `ratio` x `size`, the long one at most four times that; at least one pixel."""
    scale = ratio * size / min(height, width)
    if max(height, width) * scale > 4 * ratio * size:
        scale = 4 * ratio * size / max(height, width)
    return max(round(side * scale), 1)


def crop_of(view: Array, size: int) -> Crop:
    """The crop that a view records; its numbers must be whole."""
    left, top, right, bottom, flip = (float(value) for value in view)
    width, height = size / (right - left), size / (bottom - top)
    numbers = [width, height, left * width, top * height]
    assert max(abs(number - round(number)) for number in numbers) < 0.02, numbers
    return Crop(*(round(number) for number in numbers), bool(flip))


def mirrored(picture: Array, columns: int) -> Array:
    """The first columns, which show the image, the other way round; padding stays right of them."""
    out = picture.copy()
    out[:, :columns] = picture[:, :columns][:, ::-1]
    return out


def shown_mask(mask: Array, crop: Crop, size: int) -> tuple[Array, Array]:
    """What the crop shows, resized by nearest; and the pixels whose source is no matter of rounding."""
    out, certain = np.full((size, size), NONE, np.uint8), np.ones((size, size), bool)
    height, width = mask.shape
    for y, x in np.ndindex(size, size):
        row, column = y + crop.top, x + crop.left
        if row >= crop.height or column >= crop.width:
            continue
        source = (row + 0.5) * height / crop.height, (column + 0.5) * width / crop.width
        certain[y, x] = all(abs(place - round(place)) > 1e-3 for place in source)
        out[y, x] = mask[int(source[0]), int(source[1])]
    columns = min(size, crop.width - crop.left)
    return (mirrored(out, columns), mirrored(certain, columns)) if crop.flip else (out, certain)


def is_mixed(shown: Array) -> bool:
    """Two classes or more, none with 75 % of the labelled pixels or more."""
    pixels: dict[int, int] = {}
    for value in shown.ravel().tolist():
        if value != NONE:
            pixels[value] = pixels.get(value, 0) + 1
    return len(pixels) >= 2 and max(pixels.values()) * 4 < sum(pixels.values()) * 3


def draws(mask: Array, count: int, size: int, ratio: tuple[float, float] = (0.5, 2), seed: int = 0) -> Array:
    return draw_views(Views(count=count, size=size, ratio=ratio, seed=seed), "id", mask)


def uniformity(values: Array, low: float, high: float) -> float:
    """Kolmogorov's distance times sqrt(n): above 1.95 once in a thousand times for uniform values."""
    ranks = (np.arange(len(values)) + 0.5) / len(values)
    return float(np.abs((np.sort(values) - low) / (high - low) - ranks).max() * math.sqrt(len(values)))


@pytest.mark.parametrize("image_id", ["a", "2007_000027", ""])
@pytest.mark.parametrize("shape", [(7, 9), (1, 1), (300, 2)])
def test_the_whole_image_is_one_view(shape: tuple[int, int], image_id: str) -> None:
    for mask in (unlabelled(*shape), np.zeros(shape, np.uint8)):
        views = draw_views(Views(count=1, crop="whole", size=16, seed=3), image_id, mask)
        np.testing.assert_array_equal(views, WHOLE[None], strict=True)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValidationError, match="only one view"):
        Views(count=2, crop="whole")
    with pytest.raises(ValidationError, match=r"\[minimum, maximum\]"):
        Views(ratio=(2, 0.5))


@pytest.mark.parametrize("ratio", [(0.5, 2.0), (0.05, 0.3), (1.0, 1.0), (3.0, 5.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_crops_lie_in_the_resized_image(shape: tuple[int, int], ratio: tuple[float, float]) -> None:
    """At a whole offset, right and below of it only where the image is smaller; nothing squeezed."""
    height, width = shape
    size = 24
    mask = draw_classes(np.random.default_rng(0), shape, 0.1, 4)
    views = draws(mask, 40, size, ratio)
    assert views.shape == (40, 5) and views.dtype == np.float32
    assert set(views[:, 4]) == {0, 1} and views[:, :2].min() >= 0 and views[:, :2].max() < 1
    bounds = [[resized_side(side, height, width, size, r) for r in ratio] for side in (width, height)]
    for view in views:
        crop = crop_of(view, size)
        assert 0 <= crop.left <= max(crop.width - size, 0) and 0 <= crop.top <= max(crop.height - size, 0)
        assert bounds[0][0] <= crop.width <= bounds[0][1] and bounds[1][0] <= crop.height <= bounds[1][1]
        long, short = max(crop.width, crop.height), min(crop.width, crop.height)
        if short > 1:  # the ratio is kept, to the nearest pixel
            assert abs(long - short * max(shape) / min(shape)) <= 0.5 + 0.5 * max(shape) / min(shape)
        assert (view[2] <= 1) == (crop.width >= size) and (view[3] <= 1) == (crop.height >= size)
        shown = replay(view, mask, size)
        assert shown.shape == (size, size) and shown.dtype == np.uint8 and shown.flags.c_contiguous
        expected, certain = shown_mask(mask, crop, size)
        np.testing.assert_array_equal(shown[certain], expected[certain])
        padding = np.array([[x >= crop.width or y >= crop.height for x in range(size)] for y in range(size)])
        np.testing.assert_array_equal(inside(view, size), ~padding)


def test_boxes_of_square_crops_are_square_on_the_image() -> None:
    """In pixels of the image, whatever its shape; a test that knows nothing of resized images."""
    for shape in ((480, 640), (640, 480), (100, 399), (375, 500)):
        views = draws(unlabelled(*shape), 50, 64)
        wide, high = (views[:, 2] - views[:, 0]) * shape[1], (views[:, 3] - views[:, 1]) * shape[0]
        np.testing.assert_allclose(wide, high, rtol=0.04)  # the resized image has whole pixels
        ratio = min(shape) / wide
        assert 0.48 < ratio.min() < 0.8 and 1.6 < ratio.max() < 2.05


@pytest.mark.parametrize("shape", [(80, 120), (120, 80), (40, 400)])
def test_ratios_and_flips_are_uniform(shape: tuple[int, int]) -> None:
    """Both ends are reached, whichever side is the short one, and beyond 4 : 1 the long one decides."""
    size, low, high = 64, 0.5, 2.0
    views = draws(unlabelled(*shape), 1000, size, (low, high))
    crops = [crop_of(view, size) for view in views]
    if max(shape) > 4 * min(shape):
        ratios = np.array([max(crop.width, crop.height) / (4 * size) for crop in crops])
    else:
        ratios = np.array([min(crop.width, crop.height) / size for crop in crops])
    assert low - 0.01 < ratios.min() < low + 0.02 and high - 0.02 < ratios.max() < high + 0.01
    assert uniformity(ratios, low, high) < 2.2
    flips = views[:, 4].mean()
    assert 0.44 < flips < 0.56
    assert abs(np.corrcoef(ratios, views[:, 4])[0, 1]) < 0.1


def test_corners_are_uniform_from_border_to_border() -> None:
    """Of an image of 16 x 11 at its own size: 13 columns and 8 rows, each as often."""
    views = draws(unlabelled(11, 16), 2000, 4, (11 / 4, 11 / 4))
    crops = [crop_of(view, 4) for view in views]
    for places, count in ((np.bincount([c.left for c in crops]), 13), (np.bincount([c.top for c in crops]), 8)):
        assert len(places) == count
        expected = 2000 / count
        assert ((places - expected) ** 2 / expected).sum() < 35  # chi squared, 12 and 7 degrees of freedom
    assert abs(np.corrcoef([c.left for c in crops], [c.top for c in crops])[0, 1]) < 0.08


def mask_of_columns(*columns: str) -> Array:
    """Four rows; each column is written from top to bottom, or as the one class that it holds; - is unlabelled."""
    values = {"-": NONE} | {str(digit): digit for digit in range(10)}
    return np.array([[values[sign] for sign in (column * 4)[:4]] for column in columns], np.uint8).T.copy()


# Crops of 4 x 4 of an image of 4 x 16, which is not resized: which of the 13 are mixed is counted by hand.
COLUMNS = {
    "exactly 75 % is too much": ("0001000100010011", {11, 12}),
    "just below 75 % is not": (["0"] * 8 + ["0", "0", "0111", "1"] + ["1"] * 4, {8, 9}),
    "one class beside unlabelled pixels": (["-", "-", "0", "0"] * 3 + ["-", "-", "0", "1"], {12}),
    "unlabelled pixels are no class": (["-", "-", "-", "0"] * 3 + ["-", "-", "-", "0011"], {12}),
    "three classes": (["0"] * 12 + ["0", "0", "1", "2"], {12}),
    "nowhere": (["0"] * 8 + ["-"] * 8, set()),
    "everywhere": (["0", "1"] * 8, set(range(13))),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_crops_are_mixed_where_ten_tries_find_one(case: str) -> None:
    """As often as ten tries do, and the mixed ones are equally likely."""
    columns, mixed = COLUMNS[case]
    mask, count = mask_of_columns(*columns), 1000
    assert mask.shape == (4, 16)
    windows = {left for left in range(13) if is_mixed(mask[:, left : left + 4])}
    assert windows == mixed
    places = np.bincount([crop_of(v, 4).left for v in draws(mask, count, 4, (1, 1))], minlength=13)
    found = np.isin(np.arange(13), list(windows))
    share = 1 - (1 - len(windows) / 13) ** 10
    assert abs(places[found].sum() / count - share) < 0.05
    if windows:
        expected = count * share / len(windows)
        assert ((places[found] - expected) ** 2 / expected).sum() < 35
    if len(windows) < 13:  # where all ten failed, one of them is taken as it is
        expected = count * (1 - share) / (13 - len(windows))
        assert expected < 2 or ((places[~found] - expected) ** 2 / expected).sum() < 40


def test_the_share_that_a_class_may_have() -> None:
    """Of 16 pixels 11 are fine, and 12 are not, wherever they lie."""
    for ones, fine in ((4, False), (5, True), (11, True), (12, False)):
        mask = np.zeros((4, 16), np.uint8)
        block = np.random.default_rng(ones).permutation(16) < ones
        mask[:, 5:9] = block.reshape(4, 4)  # one window that is fine or not; those next to it overlap
        allowed = [left for left in range(13) if is_mixed(mask[:, left : left + 4])]
        assert (5 in allowed) == fine
        places = np.bincount([crop_of(v, 4).left for v in draws(mask, 300, 4, (1, 1))], minlength=13)
        share = 1 - (1 - len(allowed) / 13) ** 10
        assert abs(places[allowed].sum() / 300 - share) < 0.1


@pytest.mark.parametrize("size", [16, 32])
def test_resized_crops_are_mixed(size: int) -> None:
    """On an image that is resized, too: far more often than crops drawn by the same hand without the rule."""
    mask = np.zeros((60, 90), np.uint8)
    mask[:, 70:] = 1
    rng, views = np.random.default_rng(0), draws(mask, 120, size)
    with_rule = without = 0
    for view in views:
        crop = crop_of(view, size)
        with_rule += is_mixed(shown_mask(mask, crop, size)[0])
        left = int(rng.integers(0, max(crop.width - size, 0) + 1))
        without += is_mixed(shown_mask(mask, crop._replace(left=left), size)[0])
    assert without < 0.4 * 120 and with_rule > 2 * without


def test_the_rule_draws_the_corner_alone_anew() -> None:
    """On a mask whose large-scale crops are seldom mixed, ratios and flips are uniform all the same."""
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 1
    views = draws(mask, 800, 64)
    ratios = np.array([min(crop_of(view, 64)[:2]) / 64 for view in views])
    assert uniformity(ratios, 0.5, 2) < 2.2
    assert 0.43 < views[:, 4].mean() < 0.57


@pytest.mark.parametrize("labels", ["none", "one class", "one pixel"])
def test_masks_that_can_never_be_mixed(labels: str) -> None:
    mask = unlabelled(30, 40)
    if labels == "one class":
        mask[:] = 7
    elif labels == "one pixel":
        mask[3, 5] = 0
    views = draws(mask, 6, 16)
    assert len({tuple(view) for view in views}) == 6
    for view in views:
        crop_of(view, 16)


def test_views_depend_on_settings_id_and_mask_only() -> None:
    """Not on what was drawn before, nor on NumPy's own generator."""
    rng = np.random.default_rng(0)
    mask, other = (draw_classes(rng, (40, 60), 0.2, 2) for _ in range(2))
    settings = Views(count=4, size=16, seed=1)
    views = draw_views(settings, "a", mask)
    np.random.seed(5)
    draw_views(settings, "b", other)
    np.testing.assert_array_equal(draw_views(settings, "a", mask.copy()), views)
    np.testing.assert_array_equal(draw_views(Views(count=4, size=16, seed=1), "a", mask), views)
    assert len(np.unique(views[:, 2] - views[:, 0])) == 4
    for changed in (draw_views(Views(count=4, size=16, seed=2), "a", mask), draw_views(settings, "b", mask)):
        assert not (changed[:, None] == views).all(axis=2).any()
    assert mask.flags.writeable and (mask == draw_classes(np.random.default_rng(0), (40, 60), 0.2, 2)).all()


def test_more_views_leave_the_first_as_they_were() -> None:
    mask = draw_classes(np.random.default_rng(0), (40, 60), 0.2, 3)
    many = draws(mask, 7, 16, seed=2)
    assert len(np.unique(many, axis=0)) == 7
    for count in (1, 2, 6):
        np.testing.assert_array_equal(draws(mask, count, 16, seed=2), many[:count], strict=True)


def test_views_are_the_same_in_every_process() -> None:
    """A shard that is computed again gets the views it had: nothing may hang on a process's own hashing or clock."""
    mask = (np.arange(2400).reshape(40, 60) % 60 // 30).astype(np.uint8)
    views = draw_views(Views(count=3, size=16), "2007_000027", mask)
    np.testing.assert_allclose(
        views,
        [
            [0.382979, 0.419355, 0.723404, 0.935484, 1.0],
            [0.0, 0.0, 1.142857, 1.6, 1.0],
            [0.238095, 0.0, 1.0, 1.142857, 1.0],
        ],
        atol=2e-6,
    )


# --- replaying ---


def slow_nearest(view: Array, mask: Array, size: int, fill: int) -> Array:
    """Of boxes that begin and end at pixels of the image."""
    height, width = mask.shape
    left, top, right, bottom = (float(v) * side for v, side in zip(view[:4], (width, height) * 2, strict=True))
    out = np.full((size, size), fill, np.uint8)
    for y, x in np.ndindex(size, size):
        row, column = top + (y + 0.5) * (bottom - top) / size, left + (x + 0.5) * (right - left) / size
        if row < height and column < width:
            out[y, x] = mask[math.floor(row), math.floor(column)]
    columns = min(size, round((width - left) * size / (right - left)))
    return mirrored(out, columns) if view[4] else out


def triangle(length: int, start: float, end: float, count: int) -> Array:
    """(count, length) weights of a bilinear filter that widens when it shrinks, over the pixels there are."""
    step = (end - start) / count
    wide = max(step, 1)
    out = np.zeros((count, length))
    for i, j in np.ndindex(count, length):
        out[i, j] = max(0.0, 1 - abs(j + 0.5 - (start + (i + 0.5) * step)) / wide)
    return out / out.sum(axis=1, keepdims=True)


# Boxes in sixteenths of a 16 x 32 picture's sides; beyond 16 is padding.
BOXES = [(0, 0, 16, 16), (4, 2, 8, 10), (8, 8, 16, 16), (3, 5, 4, 13), (0, 0, 32, 32), (0, 4, 32, 12), (2, 0, 10, 64)]


def extent(box: tuple[int, ...], size: int) -> list[float]:
    """Columns and rows of the output that show the image."""
    return [min(size * (16 - box[axis]) / (box[axis + 2] - box[axis]), size) for axis in range(2)]


# Where the image ends between two output pixels.
CASES = [(b, size) for b in BOXES for size in (1, 4, 8, 16, 40, 64) if all(n == round(n) for n in extent(b, size))]


@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize(("box", "size"), [case for case in CASES if case[1] != 40])
def test_masks_by_the_slow_reference(box: tuple[int, ...], size: int, flip: int) -> None:
    mask = draw_picture(np.random.default_rng(0), 16, 32)
    view = np.array([*(side / 16 for side in box), flip], np.float32)
    found = replay(view, mask, size, 7)
    np.testing.assert_array_equal(found, slow_nearest(view, mask, size, 7), strict=True)


@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize(("box", "size"), CASES)
def test_images_by_the_slow_reference(box: tuple[int, ...], size: int, flip: int) -> None:
    """Bilinear, to rounding; padding has the colour that is asked for."""
    image, colour = draw_picture(np.random.default_rng(0), 16, 32, 3), (7, 100, 250)
    view = np.array([*(side / 16 for side in box), flip], np.float32)
    columns, rows = map(round, extent(box, size))
    across = triangle(32, 2 * box[0], min(2 * box[2], 32), columns)
    down = triangle(16, box[1], min(box[3], 16), rows)
    expected = np.empty((size, size, 3))
    expected[:] = colour
    expected[:rows, :columns] = np.einsum("yh,xw,hwc->yxc", down, across, image.astype(float))
    found = replay(view, image, size, colour)
    assert found.shape == (size, size, 3) and found.dtype == np.uint8 and found.flags.c_contiguous
    assert np.abs(found - (mirrored(expected, columns) if flip else expected)).max() < 1.01


@pytest.mark.parametrize("height", [25, 64, 96])
@pytest.mark.parametrize("width", [25, 64, 96])
def test_padding(width: int, height: int) -> None:
    """Right and below, flipped or not; masks have none there, images the colour, and `inside` knows the pixels."""
    size, rng = 32, np.random.default_rng(0)
    ratio = min(width, height) / size
    mask, image = draw_classes(rng, (height, width), 0, 4), draw_picture(rng, height, width, 3)
    for view in draws(mask, 12, size, (ratio, ratio)):  # not resized
        crop = crop_of(view, size)
        assert (crop.width, crop.height) == (width, height)
        part = slice(crop.top, crop.top + size), slice(crop.left, crop.left + size)
        seen, shown, there = unlabelled(size, size), np.full((size, size, 3), (1, 2, 3)), np.zeros((size, size), bool)
        rows, columns = mask[part].shape
        shown_part, seen_part = image[part], mask[part]
        if crop.flip:
            shown_part, seen_part = shown_part[:, ::-1], seen_part[:, ::-1]
        seen[:rows, :columns], shown[:rows, :columns], there[:rows, :columns] = seen_part, shown_part, True
        np.testing.assert_array_equal(replay(view, mask, size), seen)
        np.testing.assert_array_equal(replay(view, image, size, (1, 2, 3)), shown)
        np.testing.assert_array_equal(replay(view, np.ones_like(mask), size, 0), there)
        found = inside(view, size)
        assert found.dtype == bool
        np.testing.assert_array_equal(found, there)
        assert there.all() == (width >= size and height >= size)


@pytest.mark.parametrize("shape", SHAPES)
def test_inside_is_what_shows_the_image(shape: tuple[int, int]) -> None:
    ones = np.ones(shape, np.uint8)
    for size in (8, 33):
        for view in draws(unlabelled(*shape), 15, size, (0.1, 2)):
            np.testing.assert_array_equal(inside(view, size), replay(view, ones, size, 0) == 1)
            image = replay(view, np.full((*shape, 3), 9, np.uint8), size, (1, 1, 1))
            np.testing.assert_array_equal(inside(view, size), (image == 9).all(axis=2))
            assert inside(view, size).any()


@pytest.mark.parametrize("view", [WHOLE, FLIPPED])
def test_the_whole_image_has_no_padding(view: Array) -> None:
    for size in (1, 7, 32):
        assert inside(view, size).all() and inside(view, size).shape == (size, size)


def test_padding_colour() -> None:
    """What normalisation brings nearest to 0."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    colour = padding_colour(mean)
    assert colour == (123, 117, 104)
    assert normalise(np.array([[[colour]]], np.uint8), mean, std).abs().max() < 0.01
    assert padding_colour((0, 0.5, 1)) in {(0, 127, 255), (0, 128, 255)}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("height", "width", "size"), [(200, 120, 64), (90, 250, 96), (100, 100, 200)])
def test_image_and_mask_show_the_recorded_place(height: int, width: int, size: int, seed: int) -> None:
    """Pictures that hold their own coordinates."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    image = np.stack([y, x, x], axis=2)
    for view in draws(unlabelled(height, width), 3, size, seed=seed):
        left, top, right, bottom, flip = view.astype(float)
        at = (np.arange(size) + 0.5) / size
        rows = np.clip((top + at * (bottom - top)) * height - 0.5, 0, height - 1)
        columns = np.clip((left + at * (right - left)) * width - 0.5, 0, width - 1)
        there = inside(view, size)
        columns = mirrored(columns[None], there.any(axis=0).sum())[0] if flip else columns
        shown = replay(view, image, size).astype(float)
        assert np.abs(shown[:, :, 0] - rows[:, None])[there].max() <= 2.01  # shrunk by up to 4 at the border
        assert np.abs(shown[:, :, 1] - columns[None])[there].max() <= 2.01
        assert np.abs(replay(view, x, size) - columns[None])[there].max() <= 0.51
        assert np.abs(replay(view, y, size) - rows[:, None])[there].max() <= 0.51


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


@pytest.mark.parametrize("padding", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 0.5, 0.6, 1.0])
@pytest.mark.parametrize(("size", "grid"), [(32, 8), (8, 8), (12, 4), (21, 3), (6, 1)])
def test_unannotated_tokens(size: int, grid: int, ignored: float, padding: float) -> None:
    """`shown` as padding is, and as any other set of pixels."""
    rng = np.random.default_rng(grid)
    mask = draw_classes(rng, (size, size), ignored, 9)
    strip = np.zeros((size, size), bool)
    strip[: size - round(padding * size / 2), round(padding * size) :] = True
    for shown in (strip, strip[:, ::-1], rng.random((size, size)) >= padding):
        found = unannotated_tokens(mask, shown, grid)
        np.testing.assert_array_equal(found, reference.unannotated_tokens(mask, grid, shown), strict=True)


@pytest.mark.parametrize(("ignored", "expected"), [(7, False), (8, False), (9, True), (16, True)])
def test_half_of_a_token_is_not_over_half(ignored: int, expected: bool) -> None:
    mask = np.arange(16, dtype=np.uint8).reshape(4, 4)
    mask[mask < ignored] = 255
    assert unannotated_tokens(mask, np.ones((4, 4), bool), 1).tolist() == [[expected]]


@pytest.mark.parametrize(("padded", "expected"), [(0, True), (7, True), (8, False), (12, False), (16, False)])
def test_padding_is_nothing_to_discover(padded: int, expected: bool) -> None:
    """Of a token's 16 pixels, all without a class, over half must show the image."""
    shown = np.arange(16).reshape(4, 4) >= padded
    assert unannotated_tokens(unlabelled(4, 4), shown, 1).tolist() == [[expected]]


def test_padding_tokens_are_never_unannotated() -> None:
    """Through a view of an image that is smaller than the crop."""
    seen = unlabelled(10, 30)
    for view in draws(seen, 10, 32, (10 / 32, 10 / 32)):
        found = unannotated_tokens(replay(view, seen, 32), inside(view, 32), 8)
        expected = np.zeros((8, 8), bool)
        expected[:2, :7] = True  # rows 8 and 9 are half of the third token's, 28 and 29 of the last column's
        np.testing.assert_array_equal(found, expected)


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
