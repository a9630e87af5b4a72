"""The reader: what a pixel means, which classes training sees, and what is said of a broken file."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from configs.dataset import Split
from configs.errors import UserError
from pipeline.data.dataset import SegmentationDataset
from pipeline.data.files import BrokenFile
from tests.pipeline.data.trees import AMONG_SEEN, Tree, draw_pair
from tests.reference import NONE, Array

Read = Callable[[SegmentationDataset], object]

SIZES = [(1, 1), (9, 7), (5, 40)]


def refusal(action: Callable[[], object]) -> str:
    """Of the whole dataset: not what `--on-error skip` could leave out."""
    with pytest.raises(UserError) as error:
        action()
    assert "\n" not in str(error.value) and not isinstance(error.value, BrokenFile)
    return str(error.value)


def broken(action: Callable[[], object]) -> str:
    """Of one image or mask."""
    with pytest.raises(BrokenFile) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "LA", "RGBA", "P", "P with transparency"])
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
        image, expected = Image.fromarray(pixels[..., :2]), on_white(np.stack([channel] * 3, axis=2), pixels[..., 1])
    elif mode == "RGBA":
        image, expected = Image.fromarray(np.dstack([pixels, channel])), on_white(pixels, channel)
    else:
        colours = rng.integers(0, 256, (256, 3)).astype(np.uint8)
        image, expected = Image.fromarray(channel), colours[channel]
        image.putpalette(colours.tobytes())
        if "transparency" in mode:
            expected = on_white(expected, np.where(channel == channel[0, 0], 0, 255))
    assert image.mode == mode.split()[0]
    tree.add("a", image, mask, **({"transparency": int(channel[0, 0])} if "transparency" in mode else {}))
    np.testing.assert_allclose(tree.read().image(0).astype(int), expected, atol=1)


def on_white(colours: Array, alpha: Array) -> Array:
    """As people see it, and as `predict` does; what a transparent pixel hides is no part of the picture."""
    share = alpha.astype(float)[..., None] / 255
    return np.asarray(np.rint(share * colours + (1 - share) * 255), int)


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


def smooth(height: int = 40, width: int = 60) -> Array:
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    return np.stack([y, x, 255 - x], axis=2)


# Grey, in two inks and a half as CMYK, with chroma of half the size, interlaced: what cameras and web sites hand out.
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "progressive", "chroma"])
def test_jpeg(mode: str, tree: Tree) -> None:
    """Whatever the name says; a smooth picture, close to what went in."""
    image = Image.fromarray(smooth())
    options: dict[str, Any] = {"progressive": {"progressive": True}, "chroma": {"subsampling": 2}}.get(mode, {})
    stored = image if options else image.convert(mode)
    tree.add("a", stored, np.zeros((40, 60), np.uint8), format="JPEG", quality=95, **options)
    with Image.open(tree.image_path("a")) as opened:
        assert opened.format == "JPEG" and opened.mode == stored.mode
    found = tree.read().image(0)
    assert found.shape == (40, 60, 3) and found.dtype == np.uint8
    assert np.abs(found.astype(int) - np.asarray(stored.convert("RGB"))).max() < 12
    assert mode == "L" or np.abs(found.astype(int) - smooth()).max() < 12


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_of_more_bits(mode: str, tree: Tree) -> None:
    """16 bits are read as `predict` reads them; of 32 nobody knows the range, and Pillow would show them white."""
    grey = np.random.default_rng(0).integers(0, 256, (9, 7)).astype(np.uint8)
    name = "a.png" if mode == "I;16" else "a.tif"
    stored = {"I;16": np.uint16(257) * grey, "I": np.int32(257) * grey, "F": grey.astype(np.float32)}[mode]
    Image.fromarray(grey).save(tree.mask_path("a"))
    Image.fromarray(stored).save(tree.root / "images" / name)
    dataset = tree.read({"images": "images/{id}.*"})
    if mode == "I;16":
        np.testing.assert_array_equal(dataset.image(0), np.stack([grey] * 3, axis=2), strict=True)
    else:
        found = broken(lambda: dataset.image(0))
        said = f"has 32-bit values (mode {mode}): convert it to 8 bits per channel"
        assert found == f"image {tree.root / 'images' / name} {said}"


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


# values, ignore_index -> mask value of each of the five classes, by hand.
CODINGS: list[tuple[str | None, int | list[int], list[int]]] = [
    (None, 255, [0, 1, 2, 3, 4]),
    (None, 0, [1, 2, 3, 4, 5]),  # VOC's background, ADE20K's "other": the classes move up
    (None, [0, 2, 255], [1, 3, 4, 5, 6]),
    (None, [3, 1, 0, 250], [2, 4, 5, 6, 7]),  # in any order
    (None, [], [0, 1, 2, 3, 4]),
    ("1-5", [0, 255], [1, 2, 3, 4, 5]),
    ("0-1, 12-13,255", [7], [0, 1, 12, 13, 255]),  # 255 may be a class in the file
    ("7-8, 11-13", [0, 1, 2, 3, 4, 5, 6, 9, 10, 255], [7, 8, 11, 12, 13]),
    ("250-254", 255, [250, 251, 252, 253, 254]),
    ("9, 0-2, 7", 255, [9, 0, 1, 2, 7]),  # in any order
]


@pytest.mark.parametrize(("values", "ignore_index", "coded"), CODINGS)
@pytest.mark.parametrize("own", [False, True])
def test_what_a_pixel_value_means(
    own: bool, values: str | None, ignore_index: int | list[int], coded: list[int], tree: Tree
) -> None:
    """All 256 values, one a mask; `values` of the dataset, or those of these masks alone."""
    ignored = ignore_index if isinstance(ignore_index, list) else [ignore_index]
    for value in range(256):
        tree.add(f"{value:03}", np.zeros((2, 3, 3), np.uint8), np.full((2, 3), value, np.uint8))
    if own and values:
        dataset = tree.read({"masks": {"files": "masks/{id}.png", "values": values}}, ignore_index=ignore_index)
    else:
        dataset = tree.read(values=values, ignore_index=ignore_index)
    for value in range(256):
        if value in coded:
            truth = coded.index(value)
            assert np.unique(dataset.mask(value)).tolist() == [truth]
            assert np.unique(dataset.training_pair(value)[1]).tolist() == [AMONG_SEEN.get(truth, NONE)]
        elif value in ignored:
            assert np.unique(dataset.mask(value)).tolist() == [NONE]
        else:
            found = broken(lambda value=value: dataset.mask(value))  # type: ignore[misc]
            assert found.startswith(f"mask {tree.mask_path(f'{value:03}')} holds {value}, which is neither a class ")


def test_masks_of_their_own_values_name_ignored_ones(tree: Tree) -> None:
    """COCO-Stuff's two codings: what one calls a dropped label is a class in the other."""
    image, truth = draw_pair(np.random.default_rng(0), 9, 7)
    official = np.array([0, 1, 3, 4, 5])  # 2 was dropped
    tree.add("a", image, np.where(truth == NONE, NONE, official[truth % 5]).astype(np.uint8))
    tree.add("b", image, truth)
    tree.mask_path("b").rename(tree.root / "masks" / "b_train.png")
    masks = ["masks/{id}.png", {"files": "masks/{id}_train.png", "values": "0-4"}]
    dataset = tree.read({"masks": masks}, values="0-1, 3-5", ignore_index=[2, 255])
    for row in range(2):
        np.testing.assert_array_equal(dataset.mask(row), truth, strict=True)


def test_the_first_mask_that_exists_is_read(tree: Tree) -> None:
    """As VOC's own masks before those of SBD: file by file, not folder by folder."""
    rng = np.random.default_rng(0)
    for name in ("more", "last"):
        (tree.root / name).mkdir()
    pairs = tree.fill(rng, 4, 5, 4)
    others = [[draw_pair(rng, 5, 4)[1] for _ in range(4)] for _ in range(2)]
    for folder, masks in zip(("more", "last"), others, strict=True):
        for index, mask in enumerate(masks):
            Image.fromarray(mask).save(tree.root / folder / f"{index}.png")
    tree.mask_path("1").unlink()
    tree.mask_path("2").unlink()
    tree.mask_path("3").unlink()
    (tree.root / "more" / "2.png").unlink()
    (tree.root / "more" / "3.png").unlink()
    (tree.root / "last" / "3.png").unlink()
    dataset = tree.read({"masks": ["masks/{id}.png", "more/{id}.png", {"files": "last/{id}.png"}]})
    for row, expected in enumerate([pairs[0][1], others[0][1], others[1][2]]):
        np.testing.assert_array_equal(dataset.mask(row), expected)
    assert [dataset.mask_path(row).parent.name for row in range(4)] == ["masks", "more", "last", "masks"]
    assert broken(lambda: dataset.mask(3)).startswith(f"missing mask {tree.mask_path('3')}: ")
    sizes = {row: (tree.root / folder / f"{row}.png").stat().st_size for row, folder in ((1, "more"), (2, "last"))}
    assert [size for _, _, size in dataset.file_sizes()][1:] == [sizes[1], sizes[2], -1]
    truncate(tree.root / "more" / "1.png")  # a broken first mask is not passed over
    assert broken(lambda: dataset.pair(1)).startswith(f"mask {tree.root / 'more' / '1.png'} is truncated")


def test_masks_of_any_format(tree: Tree) -> None:
    image, truth = draw_pair(np.random.default_rng(0), 9, 7)
    for name, format in (("a", "png"), ("b", "bmp"), ("c", "TIF")):
        tree.add(name, image, truth)
        tree.mask_path(name).unlink()
        Image.fromarray(truth).save(tree.root / "masks" / f"{name}.{format}")
    dataset = tree.read({"masks": "masks/{id}.*"})
    for row in range(3):
        np.testing.assert_array_equal(dataset.mask(row), truth, strict=True)
    assert [dataset.mask_path(row).name for row in range(3)] == ["a.png", "b.bmp", "c.TIF"]


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


def test_ids_from_several_lists_follow_one_another(tree: Tree) -> None:
    """As VOC's train.txt and aug.txt."""
    tree.fill(np.random.default_rng(0), 5, 3, 5)
    tree.write("lists/train.txt", "4\n1")
    tree.write("lists/aug.txt", "\n0\n3\n")
    assert tree.read({"ids": ["lists/train.txt", "lists/aug.txt"]}).ids == ["4", "1", "0", "3"]
    assert tree.read({"ids": ["lists/aug.txt", "lists/train.txt"]}).ids == ["0", "3", "4", "1"]


@pytest.mark.parametrize("lists", [{"one.txt": "1\n0\n1\n"}, {"one.txt": "2\n1\n", "two.txt": "0\n1\n"}])
def test_an_id_listed_twice(lists: dict[str, str], tree: Tree) -> None:
    """It would be trained on twice, and two rows of the cache would have one name."""
    for name, content in lists.items():
        tree.write(name, content)
    message = refusal(lambda: tree.read({"ids": list(lists)}))
    assert message == f"split train of {tree.root} lists '1' more than once: keep one of each"


def test_more_ids_listed_twice_than_one_can_read(tree: Tree) -> None:
    tree.write("one.txt", "\n".join(map(str, [*range(12), *range(12), 99])))
    message = refusal(lambda: tree.read({"ids": ["one.txt"]}))
    assert "lists '0', '1'," in message and "'9' and 2 more more than once" in message and "99" not in message


def test_ids_from_file_names_are_sorted(tree: Tree) -> None:
    """Of the images that match the pattern; other files are none of its business."""
    image, mask = draw_pair(np.random.default_rng(0), 3, 5)
    for name in ("b_x", "a b", "10", "9", "a.b", "B"):
        tree.add(name, image, mask)
    tree.write("images/notes.txt", "no image")
    tree.write("images/10.png.part", "half of it")
    tree.write("images/png", "")
    assert tree.read().ids == ["10", "9", "B", "a b", "a.b", "b_x"]
    assert tree.read({"images": "images/{id}_x.png"}).ids == ["b"]
    assert tree.read({"images": "{id}/9.png"}).ids == ["images", "masks"]
    assert tree.read({"images": "images/a{id}b.png"}).ids == [" ", "."]


def test_ids_with_folders(tree: Tree) -> None:
    """As Cityscapes' cities, to any depth, in file names and in lists."""
    expected, pairs = ["aachen/aachen_0", "aachen/aachen_1", "ulm/old/ulm_0", "x"], {}
    for name in expected:
        for kind in ("images", "masks"):
            (tree.root / kind / name).parent.mkdir(exist_ok=True, parents=True)
        pairs[name] = draw_pair(np.random.default_rng(len(pairs)), 3, 5)
        Image.fromarray(pairs[name][0]).save(tree.root / "images" / f"{name}_left.png")
        Image.fromarray(pairs[name][1]).save(tree.root / "masks" / f"{name}_fine_ids.png")
    split = {"images": "images/{id}_left.png", "masks": "masks/{id}_fine_ids.png"}
    tree.write("list.txt", "\n".join(expected[::-1]))
    for dataset, ids in ((tree.read(split), expected), (tree.read(split | {"ids": "list.txt"}), expected[::-1])):
        assert dataset.ids == ids
        for row, name in enumerate(ids):
            found = dataset.pair(row)
            np.testing.assert_array_equal(found[0], pairs[name][0])
            np.testing.assert_array_equal(found[1], pairs[name][1])
    assert tree.read({"images": "images/ulm/{id}_left.png", "masks": "masks/ulm/{id}_fine_ids.png"}).ids == [
        "old/ulm_0"
    ]


def test_a_folder_of_one_image_each(tree: Tree) -> None:
    for name in ("b", "a"):
        tree.write(f"{name}/mask.txt")
        Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tree.root / name / "image.png")
        Image.fromarray(np.zeros((2, 2), np.uint8)).save(tree.root / name / "mask.png")
    dataset = tree.read({"images": "{id}/image.png", "masks": "{id}/mask.png"})
    assert dataset.ids == ["a", "b"]
    assert dataset.pair(0)[1].tolist() == [[0, 0], [0, 0]]


FORMATS = {"a": "jpg", "b": "JPG", "c": "png", "d": "bmp", "e": "webp", "f": "jpeg", "g": "PNG", "h.i": "tif",
           "j": "heic", "k": "avif"}  # fmt: skip


def test_images_of_mixed_formats(tree: Tree) -> None:
    """`.*` is any image format, in either case; files that are no image have no id."""
    for name, ending in FORMATS.items():
        tree.add(name, smooth(), np.zeros((40, 60), np.uint8))
        tree.image_path(name).unlink()
        Image.fromarray(smooth()).save(tree.root / "images" / f"{name}.{ending}")
    for odd in ("notes.txt", "a.xml", "Thumbs.db", "c", "list.json", "b.JPG.part"):
        tree.write(f"images/{odd}")
    dataset = tree.read({"images": "images/{id}.*"})
    assert dataset.ids == list(FORMATS)
    for row, (name, ending) in enumerate(FORMATS.items()):
        assert dataset.image_path(row) == tree.root / "images" / f"{name}.{ending}"
        assert np.abs(dataset.pair(row)[0].astype(int) - smooth()).max() < 40
        assert dataset.file_sizes()[row][1] == dataset.image_path(row).stat().st_size
    tree.write("list.txt", "h.i\nb\nmissing")
    listed = tree.read({"images": "images/{id}.*", "ids": "list.txt"})
    assert [listed.image_path(row).name for row in range(2)] == ["h.i.tif", "b.JPG"]
    assert broken(lambda: listed.image(2)).startswith(f"missing image {tree.root}/images/missing.")


def test_one_id_in_two_formats(tree: Tree) -> None:
    """Which of them is meant nobody knows; the other images are read."""
    pairs = tree.fill(np.random.default_rng(0), 2, 3, 5)
    Image.fromarray(smooth()).save(tree.root / "images" / "1.jpg")
    dataset = tree.read({"images": "images/{id}.*"})
    message = broken(lambda: dataset.image(1))
    assert message.startswith(
        f"{tree.root}/images/1.jpg and {tree.root}/images/1.png have the same id: keep one, or put"
    )
    np.testing.assert_array_equal(dataset.image(0), pairs[0][0])


@pytest.mark.parametrize("ending", ["Jpg", "JpEg", "Png"])
def test_any_spelling_of_an_ending(ending: str, tree: Tree) -> None:
    """A file that gives an id is found again by it."""
    tree.add("a", smooth(), np.zeros((40, 60), np.uint8))
    tree.image_path("a").rename(tree.root / "images" / f"a.{ending}")
    dataset = tree.read({"images": "images/{id}.*"})
    assert dataset.ids == ["a"] and dataset.image(0).shape == (40, 60, 3)


@pytest.mark.parametrize("pattern", ["images/{id}.png", "images/{id}.*"])
@pytest.mark.parametrize("hidden", ["._0.png", ".0.png", ".git/0.png"])
def test_hidden_files_are_no_images(hidden: str, pattern: str, tree: Tree) -> None:
    """As macOS leaves beside every file it copies."""
    tree.fill(np.random.default_rng(0), 2, 3, 5)
    tree.write(f"images/{hidden}", "\x00\x05\x16\x07")
    assert tree.read({"images": pattern}).ids == ["0", "1"]


def test_names_with_signs_that_mean_something_elsewhere(tree: Tree) -> None:
    names = ["[red]a[/red]", "a?b", "a{b}", "a%20b", "a'b", "a*b", "é"]
    for folder in ("images", "masks"):
        (tree.root / folder / "[red]a[").mkdir()
    for name in names:
        tree.add(name, smooth(), np.zeros((40, 60), np.uint8))
    for split in ({}, {"images": "images/{id}.*"}):
        dataset = tree.read(split)
        assert dataset.ids == sorted(names)
        for row in range(len(names)):
            assert dataset.pair(row)[0].shape == (40, 60, 3)


def test_folders_with_signs_that_mean_something_in_patterns(tree: Tree) -> None:
    """The pattern's only sign is `.*`; [1] is no choice of one."""
    tree.fill(np.random.default_rng(0), 2, 3, 5)
    (tree.root / "images").rename(tree.root / "images [1]")
    assert tree.read({"images": "images [1]/{id}.png"}).ids == ["0", "1"]


def test_ids_in_lists_may_hold_spaces(tree: Tree) -> None:
    """One id a line, as file names allow."""
    image, mask = draw_pair(np.random.default_rng(0), 3, 5)
    tree.add("a b", image, mask)
    tree.write("list.txt", "a b\n")
    dataset = tree.read({"ids": "list.txt"})
    assert dataset.ids == ["a b"] and dataset.pair(0)[1].shape == (3, 5)


def test_a_list_from_windows(tree: Tree) -> None:
    """With carriage returns and the mark of UTF-8 that its editor puts first."""
    tree.fill(np.random.default_rng(0), 2, 3, 5)
    (tree.root / "list.txt").write_bytes(b"\xef\xbb\xbf0\r\n1\r\n")
    assert tree.read({"ids": "list.txt"}).ids == ["0", "1"]


@pytest.mark.parametrize("name", ["x" * 300, "a\x00b", "0.png/b"])
def test_an_id_that_can_be_no_file(name: str, tree: Tree) -> None:
    """As when a list is no list."""
    tree.fill(np.random.default_rng(0), 1, 3, 5)
    tree.write("list.txt", f"0\n{name}\n")
    split = {"images": "images/{id}", "masks": ["masks/{id}", "masks/{id}.*"], "ids": "list.txt"}
    dataset = tree.read(split)
    for read in (dataset.image, dataset.mask, dataset.pair):
        broken(lambda read=read: read(1))  # type: ignore[misc]
    assert dataset.file_sizes()[1] == (name, -1, -1)


@pytest.mark.parametrize("images", ["images/{id}.png", "images/{id}.*"])
def test_no_images(images: str, tree: Tree) -> None:
    message = refusal(lambda: tree.read({"images": images}))
    assert message == f"{tree.root} holds no file {images}: check the dataset's files, its YAML and --data-root"


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_lists(content: str, tree: Tree) -> None:
    first = tree.write("list.txt", content)
    tree.write("other.txt", content)
    for ids in ("list.txt", ["list.txt", "other.txt"]):
        message = refusal(lambda ids=ids: tree.read({"ids": ids}))  # type: ignore[misc]
        assert message == f"the split list {first} is empty: check the dataset's files, its YAML and --data-root"


def test_no_list(tree: Tree) -> None:
    expected = f"cannot read the split list {tree.root / 'list.txt'}: "
    assert refusal(lambda: tree.read({"ids": "list.txt"})).startswith(expected)
    (tree.root / "list.txt").mkdir()
    assert refusal(lambda: tree.read({"ids": "list.txt"})).startswith(expected)


def test_list_that_is_not_text(tree: Tree) -> None:
    (tree.root / "list.txt").write_bytes(b"\xff\xfe\x00")
    assert str(tree.root / "list.txt") in refusal(lambda: tree.read({"ids": "list.txt"}))


def test_the_second_list_is_missing(tree: Tree) -> None:
    tree.write("list.txt", "0\n")
    expected = f"cannot read the split list {tree.root / 'aug.txt'}: "
    assert refusal(lambda: tree.read({"ids": ["list.txt", "aug.txt"]})).startswith(expected)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_counts_are_for_others_to_compare(count: int, tree: Tree) -> None:
    """A dataset that is not complete is one to try things on."""
    tree.fill(np.random.default_rng(0), 3, 3, 5)
    assert tree.read().expected == 3
    dataset = tree.read({"count": count})
    assert len(dataset) == 3 and dataset.expected == count and dataset.pair(2)[1].shape == (3, 5)


def test_unknown_split(tree: Tree) -> None:
    files = Split(images="{id}", masks="{id}")
    config = tree.config(splits={"train": files, "val": files})
    message = refusal(lambda: SegmentationDataset(config, tree.data_root, "test"))
    assert message == "dataset tiny has no split 'test'; it has train, val"


def test_no_folder(tree: Tree) -> None:
    config = tree.config()
    for data_root in (tree.data_root / "elsewhere", tree.data_root / "file"):
        (tree.data_root / "file").touch()
        message = refusal(lambda root=data_root: SegmentationDataset(config, root, "train"))  # type: ignore[misc]
        assert message == (
            f"no folder {data_root / 'tiny' / 'images'} (nor {data_root / 'images'}): put dataset tiny there, or pass "
            "its folder as --data-root"
        )


@pytest.mark.parametrize("root", ["tiny", "", "deep/er/tiny"])
def test_data_root_may_be_the_folder_itself(root: str, tree: Tree) -> None:
    """Or its parent, which counts first where both would do."""
    pairs = tree.fill(np.random.default_rng(0), 2, 3, 5)
    config = tree.config(root=root)
    dataset = SegmentationDataset(config, tree.root, "train")
    assert dataset.root == tree.root and dataset.ids == ["0", "1"]
    np.testing.assert_array_equal(dataset.image(1), pairs[1][0])


def test_the_folder_below_data_root_counts_first(tree: Tree) -> None:
    """Where there are images in it: an empty one beside the images hides nothing."""
    tree.fill(np.random.default_rng(0), 2, 3, 5)
    (tree.root / "tiny").mkdir()
    assert SegmentationDataset(tree.config(), tree.root, "train").root == tree.root
    (tree.root / "tiny").rmdir()
    Tree(tree.root).fill(np.random.default_rng(1), 1, 3, 5)
    dataset = SegmentationDataset(tree.config(), tree.root, "train")
    assert dataset.root == tree.root / "tiny" and dataset.ids == ["0"]


def test_linked_folders(tree: Tree) -> None:
    """As where the data lies on another disk: the dataset, its images, a city of them."""
    expected = tree.fill(np.random.default_rng(0), 2, 3, 5)
    other = tree.data_root / "elsewhere"
    (other / "tiny" / "images").mkdir(parents=True)
    (other / "tiny" / "masks").symlink_to(tree.root / "masks")
    (other / "tiny" / "images" / "city").symlink_to(tree.root / "images")
    (tree.data_root / "links").mkdir()
    (tree.data_root / "links" / "tiny").symlink_to(other / "tiny")
    for data_root in (other, tree.data_root / "links"):
        dataset = SegmentationDataset(tree.config(), data_root, "train")
        assert dataset.ids == ["city/0", "city/1"]
        np.testing.assert_array_equal(dataset.image(1), expected[1][0])


def test_the_root_is_the_name_by_default(tree: Tree) -> None:
    tree.fill(np.random.default_rng(0), 1, 3, 5)
    settings = tree.config().model_dump(exclude={"root"})
    dataset = SegmentationDataset(type(tree.config())(**settings), tree.data_root, "train")
    assert dataset.root == tree.root


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
    *((fault, "is truncated or not an image") for fault in (truncate, empty, text, page)),
    (folder, "is a folder or device, not a file"),
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
    found = broken(lambda: (IMAGE_READERS if kind == "image" else MASK_READERS)[reader](dataset))
    assert found.startswith(f"missing {kind} {file}: " if damage is delete else f"{kind} {file} {message}")
    dataset.pair(0), dataset.pair(2)  # the other files are read as before


def test_sizes_of_missing_files(tree: Tree) -> None:
    tree.fill(np.random.default_rng(0), 3, 3, 5)
    dataset = tree.read()
    whole = dataset.file_sizes()
    assert whole == [(i, tree.image_path(i).stat().st_size, tree.mask_path(i).stat().st_size) for i in ("0", "1", "2")]
    tree.image_path("0").unlink()
    tree.mask_path("1").unlink()
    empty(tree.mask_path("2"))
    assert dataset.file_sizes() == [("0", -1, whole[0][2]), ("1", whole[1][1], -1), ("2", whole[2][1], 0)]


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
        except BrokenFile as error:
            assert str(file) in str(error) and "\n" not in str(error)
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
        except BrokenFile as error:
            assert str(file) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 10


def test_png_with_a_short_header(tree: Tree) -> None:
    tree.fill(np.random.default_rng(0), 1, 6, 5)
    file = tree.image_path("0")
    file.write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\x05IHDR" + b"\x00" * 40)
    assert str(file) in broken(lambda: tree.read().image(0))


@pytest.mark.parametrize("cut", ["header", "order", "type", "length", "orientation"])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_damaged_exif(format: str, cut: str, tree: Tree) -> None:
    """Phones and editors leave many kinds: the picture is shown, or the file named; never a traceback."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(exif.tobytes())  # Exif00 MM 002a, offset, count, then tag 0112, type 3, length 1, value 6
    start = data.index(b"MM\x00*") if b"MM\x00*" in data else data.index(b"II*\x00")
    entry = start + 10
    if cut == "header":
        data[start + 2 : start + 4] = b"\x13\x37"
    elif cut == "order":
        data[start : start + 2] = b"XX"
    elif cut == "type":
        data[entry + 2 : entry + 4] = b"\x00\x0d"
    elif cut == "length":
        data[entry + 4 : entry + 8] = struct.pack(">I", 0x7FFFFFFF)
    else:
        data[entry + 8 : entry + 10] = b"\x00\x63"
    stored = io.BytesIO()
    Image.fromarray(smooth(9, 7)).save(stored, format, exif=bytes(data))
    tree.add("a", smooth(9, 7), np.zeros((9, 7), np.uint8))
    tree.image_path("a").write_bytes(stored.getvalue())
    try:
        assert tree.read().image(0).shape in ((9, 7, 3), (7, 9, 3))
    except BrokenFile as error:
        assert str(tree.image_path("a")) in str(error)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "1", "I"])
def test_mask_of_another_mode(mode: str, tree: Tree) -> None:
    """As a picture of colours instead of indices."""
    image, mask = draw_pair(np.random.default_rng(0), 9, 7)
    tree.add("a", image, np.zeros((9, 7), np.uint8))
    Image.fromarray(mask).convert(mode).save(tree.mask_path("a"), "TIFF")
    expected = f"mask {tree.mask_path('a')} has mode {mode}: masks must be 8- or 16-bit, with one class value per pixel"
    expected += ", or RGB with colours as `values`"
    assert broken(lambda: tree.read().training_pair(0)) == expected


@pytest.mark.parametrize(("value", "ignore_index"), [(5, 255), (254, 255), (6, 5), (200, 100), (255, 0)])
@pytest.mark.parametrize("place", [(0, 0), (8, 6)])
def test_mask_with_a_class_too_many(place: tuple[int, int], value: int, ignore_index: int, tree: Tree) -> None:
    image = draw_pair(np.random.default_rng(0), 9, 7)[0]
    mask = np.full((9, 7), 2, np.uint8)
    mask[place] = value
    tree.add("a", image, mask)
    dataset = tree.read(ignore_index=ignore_index)
    expected = (
        f"mask {tree.mask_path('a')} holds {value}, which is neither a class nor ignored: correct the file, or "
        f"`values` and `ignore_index` of dataset tiny"
    )
    for read in (dataset.mask, dataset.pair, dataset.training_pair):
        assert broken(lambda read=read: read(0)) == expected  # type: ignore[misc]


def test_every_wrong_value_is_named(tree: Tree) -> None:
    mask = np.array([[0, 9, 1], [77, 4, 9]], np.uint8)
    tree.add("a", np.zeros((2, 3, 3), np.uint8), mask)
    assert " holds 9, 77, which is neither a class" in broken(lambda: tree.read().mask(0))


@pytest.mark.parametrize("size", [(7, 9), (9, 8), (1, 1)])
def test_mask_of_another_size(size: tuple[int, int], tree: Tree) -> None:
    image, _ = draw_pair(np.random.default_rng(0), 9, 7)
    tree.add("a", image, np.zeros(size, np.uint8))
    expected = (
        f"mask {tree.mask_path('a')} is {size[1]} x {size[0]} but its image is 7 x 9: both must have the same size"
    )
    dataset = tree.read()
    assert broken(lambda: dataset.pair(0)) == broken(lambda: dataset.training_pair(0)) == expected


PATTERNS: list[dict[str, Any]] = [
    {"images": "{id}/{id}.png"},
    {"images": "images/a.png"},
    {"images": "images/*/{id}.png"},
    {"images": "images/{id}*"},
    {"masks": "masks/{x}{id}.png"},
    {"masks": ["masks/{id}.png", "masks/{}.png"]},
    {"masks": {"files": "masks/*{id}.png"}},
]


@pytest.mark.parametrize("split", PATTERNS)
def test_patterns_have_one_place_for_the_id(split: dict[str, Any], tree: Tree) -> None:
    tree.fill(np.random.default_rng(0), 1, 3, 5)
    with pytest.raises(ValidationError, match=r"must contain {id} once, no other braces, and \* only as a final"):
        tree.read(split)


@pytest.mark.parametrize("masks", [None, [], [{"values": "0-4"}], {"files": "{id}", "values": "0-3"}, 3])
def test_masks_must_say_where(masks: Any) -> None:
    with pytest.raises(ValidationError):
        Tree.config(None, {"masks": masks})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"values": "0-3"}, "4 values for 5 classes"),
        ({"values": "0-5"}, "6 values for 5 classes"),
        ({"values": "4-0"}, "must be between 0 and 65535"),
        ({"values": "0-2, 2-3"}, "must be between 0 and 65535"),
        ({"values": "65532-65536"}, "must be between 0 and 65535"),
        ({"values": "a-e"}, "write numbers and ranges"),
        ({"values": "-1-3"}, "write numbers and ranges"),
        ({"values": "1-5", "ignore_index": 3}, "3 is in values and in ignore_index"),
        ({"ignore_index": 65536}, "ignore_index"),
        ({"ignore_index": [-1]}, "ignore_index"),
        ({"values": 3}, "1 values for 5 classes"),
        ({"values": 1.5}, "write numbers and ranges"),
        ({"values": [4, 3, 2, 1, 4]}, "must be between 0 and 65535"),
        ({"values": [True, 1, 2, 3, 4]}, "write a number from 0 to 65535, or a colour such as"),
        ({"values": ["#000000", 1, 2, 3, 4]}, "a list of distinct colours"),
        ({"values": [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 3], [0, 0, 0]]}, "a list of distinct colours"),
        ({"values": [[0, 0, 0], [0, 0, 256]]}, "write a number from 0 to 65535, or a colour such as"),
        ({"values": [[0, 0, 0], [0, 0, 1]]}, "values #000000, #000001 has 2 values for 5 classes"),
    ],
)
def test_codings_that_cannot_be(settings: dict[str, Any], message: str, tree: Tree) -> None:
    with pytest.raises(ValidationError, match=message):
        tree.config(**settings)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_masks_of_few_bits_keep_their_values(bits: int, tree: Tree) -> None:
    """Pillow would spread 0..3 over 0..255. Written here by hand, as Pillow writes no such files."""
    rng = np.random.default_rng(bits)
    mask = rng.integers(0, min(2**bits, 5), (6, 16)).astype(np.uint8)
    packed = np.packbits((mask[..., None] >> np.arange(bits)[::-1]) & 1, axis=None).reshape(6, -1)
    lines = b"".join(b"\0" + line.tobytes() for line in packed)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 16, 6, bits, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    ]
    tree.add("a", np.zeros((6, 16, 3), np.uint8), mask)
    tree.mask_path("a").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
    )
    if bits == 1:
        with pytest.raises(BrokenFile, match="8- or 16-bit"):
            tree.read().mask(0)
    else:
        np.testing.assert_array_equal(tree.read().mask(0), mask)
