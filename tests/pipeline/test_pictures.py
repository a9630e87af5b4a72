"""Pictures for people."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from PIL import Image, ImageFont

from pipeline.pictures import IGNORED_COLOUR, colourise, contact_sheet, legend, numbered, overlay, palette, stacked
from tests.pipeline.draws import draw_classes
from tests.reference import NONE, Array


def draw_picture(height: int, width: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 200, (height, width, 3)).astype(np.uint8)


def test_palette() -> None:
    """No two classes and no group have one colour, and those of small numbers are far apart."""
    colours = palette()
    assert colours.shape == (256, 3) and colours.dtype == np.uint8
    assert len({tuple(colour) for colour in colours.tolist()}) == 256
    assert tuple(colours[NONE]) == IGNORED_COLOUR
    few = [*colours[:20].astype(float), colours[NONE].astype(float)]
    assert min(np.linalg.norm(a - b) for a, b in combinations(few, 2)) > 25
    assert min(np.linalg.norm(a - b) for a, b in pairwise(few)) > 80
    np.testing.assert_array_equal(palette(), colours)


def test_palette_of_16_bits() -> None:
    colours = palette(65535)
    assert colours.shape == (65536, 3) and tuple(colours[65535]) == IGNORED_COLOUR != tuple(colours[255])
    np.testing.assert_array_equal(colours[:255], palette()[:255])


@pytest.mark.parametrize("size", [(1, 1), (9, 14)])
def test_colourise(size: tuple[int, int]) -> None:
    labels = draw_classes(np.random.default_rng(0), size, 0.2, 20)
    shown = colourise(labels)
    assert shown.shape == (*size, 3) and shown.dtype == np.uint8
    for place in np.ndindex(size):
        assert tuple(shown[place]) == tuple(palette()[labels[place]])


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_overlay(strength: float) -> None:
    image, labels = draw_picture(9, 14), draw_classes(np.random.default_rng(0), (9, 14), 0.2, 20)
    shown = overlay(image, labels, strength)
    assert shown.shape == image.shape and shown.dtype == np.uint8
    expected = (1 - strength) * image.astype(float) + strength * colourise(labels).astype(float)
    assert np.abs(shown - expected).max() <= 0.5 + 1e-9


def ink(labels: Array, ground: int = 128) -> Array:
    """Where `numbered` draws on a picture of one grey."""
    return (numbered(np.full((*labels.shape, 3), ground, np.uint8), labels) != ground).any(axis=2)


def crop(marked: Array) -> Array:
    """The rectangle around what is marked."""
    down, across = (np.flatnonzero(marked.any(axis=axis)) for axis in (1, 0))
    return marked[down[0] : down[-1] + 1, across[0] : across[-1] + 1]


@pytest.mark.parametrize("scale", [1, 4, 15])
def test_numbers_stand_on_the_larger_patches(scale: int) -> None:
    """Two of label 3, one of 8, one of 170; none on what is ignored or small."""
    labels = np.full((128, 100), NONE, np.uint8)
    places = [(slice(4, 44), slice(0, 40)), (slice(60, 100), slice(4, 44)), (slice(0, 40), slice(60, 100))]
    for place, label in zip(places, (3, 3, 8), strict=True):
        labels[place] = label
    labels[60:100, 60:100] = 170
    labels[110:114, 20:80] = 5
    labels = labels.repeat(scale, axis=0).repeat(scale, axis=1)
    inside = [tuple(slice(part.start * scale, part.stop * scale) for part in place) for place in places]
    marked = ink(labels)
    found = [crop(marked[place]) for place in inside]
    np.testing.assert_array_equal(found[0], found[1])
    assert found[0].shape != found[2].shape or (found[0] != found[2]).any()
    assert marked[labels == 170].any()
    assert not marked[(labels == NONE) | (labels == 5)].any()
    for place in inside:  # in the middle, as high as can be read, whole
        down = np.flatnonzero(marked[place].any(axis=1))
        assert abs(down.mean() - 20 * scale) < 3 * scale
        assert 8 * scale <= len(down) <= 16 * scale


@pytest.mark.parametrize("ground", [0, 90, 255])
def test_numbers_are_readable_on_any_ground(ground: int) -> None:
    """White inside black."""
    picture = np.full((64, 64, 3), ground, np.uint8)
    shown = numbered(picture, np.full((64, 64), 88, np.uint8))
    assert (picture == ground).all()
    assert (shown > 200).all(axis=2).sum() > 20 and (shown < 50).all(axis=2).sum() > 20


@pytest.mark.parametrize("place", [slice(70), slice(-70, None)])
def test_numbers_are_not_cut_off_by_the_edge(place: slice) -> None:
    """But for their outline."""
    labels = np.full((640, 640), NONE, np.uint8)
    labels[:, place] = 188
    whole = crop(ink(np.full((640, 640), 188, np.uint8))).shape[1]
    assert whole > 70 and crop(ink(labels)).shape[1] >= whole - round(0.07 * 640) // 8


@pytest.mark.parametrize("shape", [(1, 1), (1, 400), (300, 2), (7, 90), (65, 129), (128, 128)])
def test_noise_and_thin_pictures_get_no_numbers(shape: tuple[int, int]) -> None:
    labels = draw_classes(np.random.default_rng(0), shape, 0.2, 20)
    assert not ink(labels).any()
    assert not ink(np.full(shape, NONE, np.uint8)).any()


def test_an_overlay_is_numbered() -> None:
    image, labels = draw_picture(64, 96), np.full((64, 96), 17, np.uint8)
    mixed = (0.5 * image + 0.5 * colourise(labels)).round().astype(np.uint8)
    np.testing.assert_array_equal(overlay(image, labels, 0.5), numbered(mixed, labels))
    assert ink(labels).any()


@pytest.mark.parametrize("side", [192, 40])
@pytest.mark.parametrize("shape", [(40, 40), (8, 8), (100, 50), (50, 100), (300, 300), (1, 1), (1, 400), (20, 7)])
def test_contact_sheet(shape: tuple[int, int], side: int) -> None:
    """Pictures keep their proportions, without blank space about them; longer names only push them to the right."""
    red = np.full((*shape, 3), (255, 0, 0), np.uint8)
    rows, columns = 3, 2
    sheet = contact_sheet([[red] * columns] * rows, ["a", "b"], ["x", "yy", "zzz"], side)
    wide = contact_sheet([[red] * columns] * rows, ["a", "b"], ["x", "yy", "a long name"], side)
    assert wide.height == sheet.height and wide.width > sheet.width
    pixels = np.asarray(sheet)
    marked = (pixels == (255, 0, 0)).all(axis=2)
    down, across = (np.flatnonzero(marked.any(axis=axis)) for axis in (1, 0))
    starts_y = [y for y in down if y - 1 not in down]
    starts_x = [x for x in across if x - 1 not in across]
    assert len(starts_y) == rows and len(starts_x) == columns
    height, width = len(down) // rows, len(across) // columns
    letter = int(ImageFont.load_default(14).getlength("a"))  # the titles, and a name of 20 pixels, have room
    assert np.diff(starts_x).tolist() == [max(width, letter) + 6]
    assert np.diff(starts_y).tolist() == [max(height, 20) + 6] * 2
    assert marked.sum() == rows * columns * height * width  # whole rectangles, nothing over them
    assert max(height, width) == side
    scale = side / max(shape)
    assert abs(height - max(1, shape[0] * scale)) <= 1 and abs(width - max(1, shape[1] * scale)) <= 1
    left = pixels[:, : starts_x[0]]
    assert (left == 0).any() and (pixels[: starts_y[0]] == 0).any()  # names and titles
    assert (pixels[:, starts_x[0] + width : starts_x[1]][starts_y[0] :] == 255).all()


def test_small_pictures_are_enlarged_without_new_colours() -> None:
    picture = draw_picture(4, 4)
    sheet = np.asarray(contact_sheet([[picture]], ["t"], ["n"], side=40))
    shown = sheet[26:66, -46:-6]
    np.testing.assert_array_equal(shown, picture.repeat(10, axis=0).repeat(10, axis=1))


def test_contact_sheet_leaves_its_pictures_alone() -> None:
    picture = draw_picture(300, 200)
    before = picture.copy()
    contact_sheet([[picture, picture]], ["a", "b"], ["n"])
    np.testing.assert_array_equal(picture, before)


def test_a_legend_shortens_long_names() -> None:
    wide, wider = (legend({0: "w" * letters}) for letters in (60, 600))
    assert wide.size == wider.size and wide.width < 1000


@pytest.mark.parametrize("columns", [1, 3, 10])
@pytest.mark.parametrize("count", [1, 3, 4, 20])
def test_legend(count: int, columns: int) -> None:
    """One swatch for each name, in reading order, in the class's colour, with its number."""
    names = [f"class {index}" for index in range(count)]
    strip = legend(dict(enumerate(names)), columns)
    pixels = np.asarray(strip)
    lines = -(-count // columns)
    assert strip.height == 24 * lines + 6
    width = (strip.width - 6) // min(columns, count)
    numbers = set()
    for index in range(count):
        x, y = 6 + width * (index % columns), 6 + 24 * (index // columns)
        swatch = pixels[y : y + 17, x : x + 29]
        number = (swatch != palette()[index]).any(axis=2)
        assert not number[:, [0, 1, -2, -1]].any() and not number[[0, -1]].any()
        assert (swatch > 200).all(axis=2).any() and (swatch < 50).all(axis=2).any()
        numbers.add(number.tobytes())
        name = pixels[y : y + 17, x + 30 : min(x + width, strip.width)]
        assert (name == 0).all(axis=2).any() and (name == 255).all(axis=2).any()
    assert len(numbers) == count
    beyond = pixels[6 + 24 * (lines - 1) :, 6 + width * (count - columns * (lines - 1)) :]
    assert (beyond == 255).all()


def test_long_names_fit_into_the_legend() -> None:
    short, long = legend({0: "a", 1: "b"}), legend({0: "a", 1: "a very long class name"})
    assert long.width > short.width and long.height == short.height
    assert (np.asarray(long)[:, -1] == 255).all()


def test_stacked() -> None:
    parts = [Image.fromarray(draw_picture(height, width, height)) for height, width in ((5, 9), (1, 3), (7, 20))]
    sheet = np.asarray(stacked(parts))
    assert sheet.shape == (13, 20, 3)
    y = 0
    for part in parts:
        np.testing.assert_array_equal(sheet[y : y + part.height, : part.width], np.asarray(part))
        assert (sheet[y : y + part.height, part.width :] == 255).all()
        y += part.height
