"""What the pixels of a mask mean: colours, palettes, orientation, and kinds of file that change them."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data.dataset import SegmentationDataset
from pipeline.data.files import BrokenFile
from tests.pipeline.data.test_dataset import STORED, broken, smooth
from tests.pipeline.data.trees import CLASSES, Tree, draw_pair
from tests.reference import NONE, Array

COLOURS = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [0, 0, 128], [255, 255, 255]]
HEX = ["#" + bytes(colour).hex() for colour in COLOURS]


def coloured(mask: Array, none: tuple[int, int, int] = (9, 9, 9)) -> Array:
    return np.where((mask == NONE)[..., None], none, np.array(COLOURS)[mask % 5]).astype(np.uint8)


def palette(mask: Array, colours: list[list[int]], **options: Any) -> Image.Image:
    picture = Image.fromarray(mask)
    picture.putpalette(np.array(colours, np.uint8).tobytes())
    return picture


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("written", [COLOURS, HEX, [colour.upper() for colour in HEX]])
@pytest.mark.parametrize("own", [False, True])
def test_classes_by_colour(own: bool, written: list[Any], mode: str, tree: Tree) -> None:
    """White is a class here, though 255 is the number that is ignored; a palette is read by its colours."""
    image, truth = draw_pair(np.random.default_rng(0), 9, 7)
    stored = Image.fromarray(coloured(truth))
    if mode == "P":
        stored = palette(np.where(truth == NONE, 0, truth + 1).astype(np.uint8), [[9, 9, 9], *COLOURS])
    tree.add("a", image, stored if mode == "P" else stored.convert(mode))
    settings: dict[str, Any] = {"ignore_index": [255, [9, 9, 9]]}
    split = {"masks": {"files": "masks/{id}.png", "values": written}} if own else None
    dataset = tree.read(split, **settings, **({} if own else {"values": written}))
    np.testing.assert_array_equal(dataset.mask(0), truth, strict=True)
    again = SegmentationDataset(type(dataset.config)(**dataset.config.model_dump(mode="json")), tree.data_root, "train")
    np.testing.assert_array_equal(again.mask(0), truth, strict=True)


def test_a_grey_mask_among_coloured_ones(tree: Tree) -> None:
    tree.add("a", np.zeros((2, 2, 3), np.uint8), np.array([[0, 255], [255, 0]], np.uint8))
    assert tree.read(values=COLOURS).mask(0).tolist() == [[0, 4], [4, 0]]


def test_colours_that_mean_nothing_are_named(tree: Tree) -> None:
    mask = np.full((3, 4, 3), 128, np.uint8)
    mask[0, 0] = 0
    tree.add("a", np.zeros((3, 4, 3), np.uint8), mask)
    assert " holds #808080, which is neither a class nor ignored: " in broken(lambda: tree.read(values=COLOURS).mask(0))
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)  # as of a JPEG saved as PNG
    tree.add("b", noise, noise)
    assert " and 53 more, which is neither a class" in broken(lambda: tree.read(values=COLOURS).mask(1))


@pytest.mark.parametrize(("mode", "said"), [("LA", "has mode LA"), ("CMYK", "has mode CMYK"), ("1", "has mode 1")])
def test_colours_of_other_modes(mode: str, said: str, tree: Tree) -> None:
    Image.new("RGB", (4, 3)).save(tree.image_path("a"))
    Image.new(mode, (4, 3)).save(tree.root / "masks" / ("a.tif" if mode == "CMYK" else "a.png"))
    assert said in broken(lambda: tree.read({"masks": "masks/{id}.*"}, values=COLOURS).mask(0))


def test_what_is_transparent_has_no_colour(tree: Tree) -> None:
    tree.add("a", np.zeros((3, 4, 3), np.uint8), Image.new("RGBA", (4, 3), (0, 0, 0, 0)))
    assert "has transparent pixels" in broken(lambda: tree.read(values=COLOURS).mask(0))


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "JPEG2000", "AVIF", "HEIF", "TIFF"])
@pytest.mark.parametrize("colours", [False, True])
def test_kinds_that_change_pixels_are_no_masks(colours: bool, format: str, tree: Tree) -> None:
    """Whatever the name says; the values may all be classes, and be wrong."""
    image, truth = draw_pair(np.random.default_rng(0), 16, 16, none=0)
    tree.add("a", image, truth)
    file = BytesIO()
    mask = Image.fromarray(coloured(truth) if colours or format in ("WEBP", "AVIF") else truth)
    mask.save(file, format, **({"compression": "jpeg"} if format == "TIFF" else {}))
    tree.mask_path("a").write_bytes(file.getvalue())
    said = broken(lambda: tree.read(**({"values": COLOURS} if colours else {})).training_pair(0))
    assert said.startswith(f"mask {tree.mask_path('a')} is saved as ") and "create it again as PNG" in said


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_tiff_masks_that_are_whole(compression: str | None, tree: Tree) -> None:
    image, truth = draw_pair(np.random.default_rng(0), 9, 7)
    tree.add("a", image, truth)
    Image.fromarray(truth).save(tree.mask_path("a"), "TIFF", compression=compression)
    np.testing.assert_array_equal(tree.read().mask(0), truth, strict=True)


def tagged(file: Path, pixels: Array, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(STORED[orientation](pixels))).save(file, exif=exif)


@pytest.mark.parametrize("size", [(9, 7), (8, 8)])
@pytest.mark.parametrize("of_mask", STORED)
@pytest.mark.parametrize("of_image", [1, 3, 6])
def test_masks_with_an_orientation_of_their_own(of_image: int, of_mask: int, size: tuple[int, int], tree: Tree) -> None:
    """Both are turned upright; where the size does not tell that they fit, `datasets check` asks to look."""
    image, truth = draw_pair(np.random.default_rng(0), *size)
    tagged(tree.image_path("a"), image, of_image)
    tagged(tree.mask_path("a"), truth, of_mask)
    dataset = tree.read()
    found = dataset.pair(0)
    np.testing.assert_array_equal(found[0], image, strict=True)
    np.testing.assert_array_equal(found[1], truth, strict=True)
    untold = size == (8, 8) or (of_image > 4) == (of_mask > 4)
    said = dataset.doubts(0)
    assert bool(said) == (of_image != of_mask and untold)
    assert all("a different orientation tag" in doubt for doubt in said)


def test_a_heic_photo_that_was_turned(tree: Tree) -> None:
    """Its own boxes turn it as it is opened; the tag says that it was turned."""
    image = 6 * smooth(16, 16)
    tree.add("a", image, np.zeros((16, 16), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(image).save(tree.image_path("a"), "HEIF", quality=100, exif=exif)
    dataset = tree.read()
    assert np.abs(dataset.image(0).astype(int) - image).mean() < 12
    assert dataset.doubts(0)


def palettes(tree: Tree) -> tuple[Array, Array]:
    """Two masks whose programs chose the colours' places: index 1 is class 2 in one and class 3 in the other."""
    first, second = np.array([[0, 2], [2, 0]], np.uint8), np.array([[0, 3], [3, 3]], np.uint8)
    for name, mask, other in (("a", first, 2), ("b", second, 3)):
        tree.add(
            name, np.zeros((2, 2, 3), np.uint8), palette((mask > 0).astype(np.uint8), [COLOURS[0], COLOURS[other]])
        )
    return first, second


def test_palettes_that_differ(tree: Tree) -> None:
    """Indices are no classes then, unless `values` says so; colours are what they are."""
    first, second = palettes(tree)
    dataset = tree.read()
    assert dataset.mask(0).tolist() == (first > 0).tolist()
    assert broken(lambda: dataset.mask(1)) == (
        f"mask {tree.mask_path('b')} has a different palette from {tree.mask_path('a')}: index 1 is #000080 "
        "instead of #008000; use one palette, or, if the indices are classes, set `values`"
    )
    meant = tree.read(values="0-4")
    assert meant.mask(1).tolist() == (second > 0).tolist()
    assert meant.doubts(0) == [] and "a different palette from the first" in meant.doubts(1)[0]
    by_colour = tree.read(values=COLOURS)
    assert by_colour.mask(0).tolist() == first.tolist() and by_colour.mask(1).tolist() == second.tolist()
    assert by_colour.doubts(1) == []


@pytest.mark.parametrize("other", [[*COLOURS, [7, 7, 7]], COLOURS[:3], [*COLOURS[:3], [0, 0, 0], [0, 0, 0]]])
def test_palettes_that_agree(other: list[list[int]], tree: Tree) -> None:
    """In what is used: they may be longer, shorter, or filled with black."""
    mask = np.array([[0, 2], [2, 1]], np.uint8)
    for name, colours in (("a", COLOURS), ("b", other), ("c", COLOURS)):
        tree.add(name, np.zeros((2, 2, 3), np.uint8), palette(mask, colours))
    dataset = tree.read()
    for row in range(3):
        assert dataset.mask(row).tolist() == mask.tolist() and dataset.doubts(row) == []


def test_grey_masks_have_no_palette_to_differ(tree: Tree) -> None:
    tree.add("0", np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.uint8))
    tree.write("masks/00.png", "no mask")
    (tree.root / "images" / "00.png").write_bytes(tree.image_path("0").read_bytes())
    palettes(tree)
    dataset = tree.read()
    dataset.mask(0), dataset.mask(2)
    with pytest.raises(BrokenFile, match="a different palette from"):
        dataset.mask(3)
    assert len(CLASSES) == 5
