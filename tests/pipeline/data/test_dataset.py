"""The reader: what a pixel means, which classes training sees, and what is said of a broken file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from configs.errors import UserError
from configs.schema import Split
from pipeline.data.dataset import SegmentationDataset
from tests.pipeline.data.trees import AMONG_SEEN, CLASSES, Tree, draw_pair
from tests.reference import NONE, Array

Read = Callable[[SegmentationDataset], object]

SIZES = [(1, 1), (9, 7), (5, 40)]


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "LA", "RGBA", "P"])
def test_images_of_any_mode_become_rgb(mode: str, size: tuple[int, int], tree: Tree) -> None:
    rng = np.random.default_rng(size)
    pixels, mask = draw_pair(rng, *size)
    channel = pixels[..., 0]
    if mode == "RGB":
        image, expected = Image.fromarray(pixels), pixels
    elif mode == "L":
        image, expected = Image.fromarray(channel), np.stack([channel] * 3, axis=2)
    elif mode == "1":
        image, expected = Image.fromarray(channel > 99), np.stack([255 * (channel > 99).astype(np.uint8)] * 3, axis=2)
    elif mode == "LA":
        image, expected = Image.fromarray(pixels[..., :2]), np.stack([channel] * 3, axis=2)
    elif mode == "RGBA":
        image, expected = Image.fromarray(np.concatenate([pixels, pixels[..., :1]], axis=2)), pixels
    else:
        colours = rng.integers(0, 256, (256, 3)).astype(np.uint8)
        image, expected = Image.fromarray(channel), colours[channel]
        image.putpalette(colours.tobytes())
    assert image.mode == mode
    tree.add("a", image, mask)
    np.testing.assert_array_equal(tree.read().image(0), expected, strict=True)


# EXIF orientation -> how a camera stored an upright picture.
STORED: dict[int, Callable[[Array], Array]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright),  # to be shown it is turned clockwise
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("orientation", STORED)
def test_cameras_that_were_turned(orientation: int, size: tuple[int, int], tree: Tree) -> None:
    """The mask is that of the upright image."""
    image, mask = draw_pair(np.random.default_rng(0), *size)
    exif = Image.Exif()
    exif[0x0112] = orientation
    tree.add("a", np.ascontiguousarray(STORED[orientation](image)), mask, exif=exif)
    found = tree.read().pair(0)
    np.testing.assert_array_equal(found[0], image, strict=True)
    np.testing.assert_array_equal(found[1], mask, strict=True)


def test_jpeg(tree: Tree) -> None:
    """Whatever the name says; a smooth picture, close to what went in."""
    y, x = np.mgrid[:40, :60].astype(np.uint8)
    image = np.stack([y, x, 255 - x], axis=2)
    tree.add("a", image, np.zeros((40, 60), np.uint8), format="JPEG", quality=95)
    assert np.abs(tree.read().image(0).astype(int) - image).max() < 12


def test_sixteen_bit_image(tree: Tree) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (9, 7)).astype(np.uint8)
    tree.add("a", Image.fromarray(grey.astype(np.uint16) * 257), grey)
    try:
        found = tree.read().image(0)
    except UserError:
        return
    np.testing.assert_array_equal(found[..., 0], grey)


@pytest.mark.parametrize("ignore_index", [255, 254, 100, 5])
@pytest.mark.parametrize("mode", ["L", "P"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("none", [0.0, 0.3, 1.0])
def test_masks(none: float, size: tuple[int, int], mode: str, ignore_index: int, tree: Tree) -> None:
    """A palette's indices are the classes, whatever the colours are."""
    image, truth = draw_pair(np.random.default_rng(ignore_index), *size, none)
    stored = Image.fromarray(np.where(truth == NONE, ignore_index, truth).astype(np.uint8))
    if mode == "P":
        stored.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    assert stored.mode == mode
    tree.add("a", image, stored)
    dataset = tree.read(ignore_index=ignore_index)
    np.testing.assert_array_equal(dataset.mask(0), truth, strict=True)
    found = dataset.pair(0)
    np.testing.assert_array_equal(found[0], image, strict=True)
    np.testing.assert_array_equal(found[1], truth, strict=True)


def test_one_of_the_classes_is_ignored(tree: Tree) -> None:
    """As VOC's background, index 0."""
    image, mask = draw_pair(np.random.default_rng(0), 9, 7)
    tree.add("a", image, mask)
    np.testing.assert_array_equal(tree.read(ignore_index=0).mask(0), np.where(mask == 0, NONE, mask))


@pytest.mark.parametrize("ignore_index", [255, 77])
def test_training_never_sees_the_unseen(ignore_index: int, tree: Tree) -> None:
    image, truth = draw_pair(np.random.default_rng(0), 30, 40)
    tree.add("a", image, np.where(truth == NONE, ignore_index, truth).astype(np.uint8))
    dataset = tree.read(ignore_index=ignore_index)
    shown, seen = dataset.training_pair(0)
    np.testing.assert_array_equal(shown, image, strict=True)
    assert seen.dtype == np.uint8 and set(np.unique(truth)) == {0, 1, 2, 3, 4, NONE}
    for true, found in zip(truth.flat, seen.flat, strict=True):
        assert found == AMONG_SEEN.get(int(true), NONE)
    assert 1 in dataset.pair(0)[1] and 4 in dataset.pair(0)[1]


@pytest.mark.parametrize("seed", range(5))
def test_seen_classes_are_numbered_in_order(seed: int, tree: Tree) -> None:
    """Any number of classes, any part of them unseen; masks of unseen classes only hold nothing."""
    rng = np.random.default_rng(seed)
    names = [f"class {i}" for i in range(rng.integers(1, 255))]
    unseen = rng.permutation(names)[: rng.integers(0, len(names))].tolist()
    mask = rng.integers(0, len(names), (20, 20)).astype(np.uint8)
    tree.add("a", np.zeros((20, 20, 3), np.uint8), mask)
    dataset = tree.read(classes=tuple(names), unseen=tuple(unseen))
    seen = [name for name in names if name not in unseen]
    for true, found in zip(mask.flat, dataset.training_pair(0)[1].flat, strict=True):
        assert found == (NONE if names[true] in unseen else seen.index(names[true]))
    assert dataset.seen_lookup[NONE] == NONE


def test_ids_from_a_list_keep_its_order(tree: Tree) -> None:
    pairs = tree.fill(np.random.default_rng(0), 4, 3, 5)
    (tree.root / "list.txt").write_text("2\n0\r\n\n3\n")
    dataset = tree.read({"ids": "list.txt", "count": 3})
    assert dataset.ids == ["2", "0", "3"] and len(dataset) == 3
    for row, index in enumerate([2, 0, 3]):
        np.testing.assert_array_equal(dataset.image(row), pairs[index][0])
        np.testing.assert_array_equal(dataset.mask(row), pairs[index][1])
        assert dataset.image_path(row) == tree.image_path(str(index))
    sizes = [(i, tree.image_path(i).stat().st_size, tree.mask_path(i).stat().st_size) for i in ("2", "0", "3")]
    assert dataset.file_sizes() == sizes


def test_ids_from_file_names_are_sorted(tree: Tree) -> None:
    """Of the images that match the pattern, in the folder named and no other."""
    image, mask = draw_pair(np.random.default_rng(0), 3, 5)
    for name in ("b_x", "a b", "10", "9", "a.b"):
        tree.add(name, image, mask)
    (tree.root / "images" / "notes.txt").write_text("no image")
    (tree.root / "images" / "deeper").mkdir()
    tree.image_path("9").rename(tree.root / "images" / "deeper" / "9.png")
    assert tree.read().ids == ["10", "a b", "a.b", "b_x"]
    assert tree.read({"images": "images/{id}_x.png"}).ids == ["b"]
    assert tree.read({"images": "{id}/deeper/9.png"}).ids == ["images"]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, "images/*.png matches no file: check the dataset's files and its YAML"),
        ("", "list.txt is empty: check the dataset's files and its YAML"),
        ("\n \n", "list.txt is empty: check the dataset's files and its YAML"),
    ],
)
def test_no_images(ids: str | None, message: str, tree: Tree) -> None:
    if ids is not None:
        (tree.root / "list.txt").write_text(ids)
    found = refusal(lambda: tree.read({"ids": None if ids is None else "list.txt"}))
    assert found.endswith(message) and str(tree.root) in found


def test_no_list(tree: Tree) -> None:
    expected = f"cannot read the split list {tree.root / 'list.txt'}: "
    assert refusal(lambda: tree.read({"ids": "list.txt"})).startswith(expected)
    (tree.root / "list.txt").mkdir()
    assert refusal(lambda: tree.read({"ids": "list.txt"})).startswith(expected)


def test_list_that_is_not_text(tree: Tree) -> None:
    (tree.root / "list.txt").write_bytes(b"\xff\xfe\x00")
    assert str(tree.root / "list.txt") in refusal(lambda: tree.read({"ids": "list.txt"}))


@pytest.mark.parametrize("count", [0, 2, 4])
def test_wrong_count(count: int, tree: Tree) -> None:
    tree.fill(np.random.default_rng(0), 3, 3, 5)
    assert len(tree.read({"count": 3})) == 3
    message = refusal(lambda: tree.read({"count": count}))
    assert message.startswith(f"{tree.root}: split train has 3 images, {count} are expected; ")


def test_unknown_split(tree: Tree) -> None:
    files = Split(images="{id}", masks="{id}")
    config = tree.config(splits={"train": files, "val": files})
    message = refusal(lambda: SegmentationDataset(config, tree.data_root, "test"))
    assert message == "dataset tiny has no split 'test'; it has train, val"


def test_no_folder(tree: Tree) -> None:
    missing = tree.data_root / "elsewhere"
    for root in (missing, tree.data_root / "file"):
        (tree.data_root / "file").touch()
        message = refusal(lambda root=root: tree.read(root=root.name))  # type: ignore[misc]
        assert message == f"no folder {root}: put dataset tiny there or name its parent by --data-root"


def delete(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def text(file: Path) -> None:
    file.write_text("this is no image\n" * 20)


def page(file: Path) -> None:
    file.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


FILE_FAULTS = [
    (delete, "missing"),
    *((fault, "is truncated or not an image") for fault in (truncate, empty, text, page, folder)),
]
IMAGE_READERS: list[Read] = [lambda d: d.image(1), lambda d: d.pair(1), lambda d: d.training_pair(1)]
MASK_READERS: list[Read] = [lambda d: d.mask(1), lambda d: d.pair(1), lambda d: d.training_pair(1)]


@pytest.mark.parametrize("reader", [0, 1, 2])
@pytest.mark.parametrize(("damage", "message"), FILE_FAULTS)
@pytest.mark.parametrize("kind", ["image", "mask"])
def test_broken_file(kind: str, damage: Callable[[Path], None], message: str, reader: int, tree: Tree) -> None:
    tree.fill(np.random.default_rng(0), 3, 30, 20)
    dataset = tree.read()
    file = tree.image_path("1") if kind == "image" else tree.mask_path("1")
    damage(file)
    found = refusal(lambda: (IMAGE_READERS if kind == "image" else MASK_READERS)[reader](dataset))
    assert found.startswith(f"missing {kind} {file}: " if damage is delete else f"{kind} {file} {message}")
    dataset.pair(0), dataset.pair(2)  # the other files are read as before


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_sizes_of_missing_files(kind: str, tree: Tree) -> None:
    tree.fill(np.random.default_rng(0), 3, 3, 5)
    dataset, file = tree.read(), tree.image_path("1") if kind == "image" else tree.mask_path("1")
    file.unlink()
    assert refusal(dataset.file_sizes).startswith(f"missing file {file}: ")


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_an_image_cut_anywhere(format: str, tree: Tree) -> None:
    """It is whole or refused, wherever the copy broke off."""
    image, mask = draw_pair(np.random.default_rng(0), 6, 5)
    tree.add("a", image, mask, format=format)
    dataset, file = tree.read(), tree.image_path("a")
    whole, data, refused = dataset.image(0), file.read_bytes(), 0
    for end in range(len(data)):
        file.write_bytes(data[:end])
        try:
            np.testing.assert_array_equal(dataset.image(0), whole)
        except UserError as error:
            assert str(file) in str(error)
            refused += 1
    assert refused > 0.8 * len(data)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_flipped_bits(format: str, tree: Tree) -> None:
    """Only a UserError may come of them; PNG has checksums, JPEG shows noise."""
    rng = np.random.default_rng(0)
    image, mask = draw_pair(rng, 6, 5)
    tree.add("a", image, mask, format=format)
    dataset, file = tree.read(), tree.image_path("a")
    data = file.read_bytes()
    refused = 0
    for _ in range(150):
        broken = bytearray(data)
        broken[rng.integers(len(data) // 8, len(data))] ^= 1 << int(rng.integers(8))
        file.write_bytes(broken)
        try:
            dataset.image(0)
        except UserError as error:
            assert str(file) in str(error)
            refused += 1
    assert refused > 10


def test_png_with_a_short_header(tree: Tree) -> None:
    tree.fill(np.random.default_rng(0), 1, 6, 5)
    file = tree.image_path("0")
    file.write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\x05IHDR" + b"\x00" * 40)
    assert str(file) in refusal(lambda: tree.read().image(0))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "1", "I;16"])
def test_mask_of_another_mode(mode: str, tree: Tree) -> None:
    """As a picture of colours instead of indices."""
    image, mask = draw_pair(np.random.default_rng(0), 9, 7)
    tree.add(
        "a", image, Image.fromarray(mask.astype(np.uint16)) if mode == "I;16" else Image.fromarray(mask).convert(mode)
    )
    expected = f"mask {tree.mask_path('a')} has mode {mode}: masks must be 8-bit, one class index a pixel"
    assert refusal(lambda: tree.read().training_pair(0)) == expected


@pytest.mark.parametrize(("value", "ignore_index"), [(5, 255), (254, 255), (6, 5), (200, 100)])
@pytest.mark.parametrize("place", [(0, 0), (8, 6)])
def test_mask_with_a_class_too_many(place: tuple[int, int], value: int, ignore_index: int, tree: Tree) -> None:
    image, mask = draw_pair(np.random.default_rng(0), 9, 7, none=0)
    mask[place] = value
    tree.add("a", image, mask)
    dataset = tree.read(ignore_index=ignore_index)
    expected = f"mask {tree.mask_path('a')} holds the value {value}: only 0..{len(CLASSES) - 1} and {ignore_index} are "
    for read in (dataset.mask, dataset.pair, dataset.training_pair):
        assert refusal(lambda read=read: read(0)).startswith(expected)  # type: ignore[misc]


@pytest.mark.parametrize("size", [(7, 9), (9, 8), (1, 1)])
def test_mask_of_another_size(size: tuple[int, int], tree: Tree) -> None:
    image, _ = draw_pair(np.random.default_rng(0), 9, 7)
    tree.add("a", image, np.zeros(size, np.uint8))
    expected = f"mask {tree.mask_path('a')} is {size[1]} x {size[0]} but its image is 7 x 9: both must have one size"
    dataset = tree.read()
    assert refusal(lambda: dataset.pair(0)) == refusal(lambda: dataset.training_pair(0)) == expected


PATTERNS: list[dict[str, Any]] = [{"images": "{id}/{id}.png"}, {"masks": "masks/{x}{id}.png"}]


@pytest.mark.parametrize("split", PATTERNS)
def test_pattern_with_two_places(split: dict[str, Any], tree: Tree) -> None:
    tree.fill(np.random.default_rng(0), 1, 3, 5)
    with pytest.raises(ValidationError, match="once, and no other braces"):
        tree.read(split)
