"""Files as people have them: what a folder holds, and that whatever goes wrong in a decoder is said of its file."""

import os
import struct
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from configs.errors import UserError
from pipeline.data.files import ENDINGS, BrokenFile, files_in
from pipeline.data.photos import find_photos, read_photo
from tests.pipeline.data.trees import Tree, draw_pair

FUZZED = ("JPEG", "PNG", "TIFF", "WEBP", "HEIF", "AVIF")


def stored(format: str, **options: Any) -> bytes:
    """A picture of 24 x 16 as a file of this format."""
    pixels = np.add.outer(np.arange(16) * 9, np.arange(24) * 4).astype(np.uint8)
    file = BytesIO()
    Image.fromarray(np.dstack([pixels, 255 - pixels, pixels.T.repeat(2, 0)[:16, :16].repeat(2, 1)[:, :24]])).save(
        file, format, **options
    )
    return file.getvalue()


def broken(file: Path) -> str:
    with pytest.raises(BrokenFile) as error:
        read_photo(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


# --- what a decoder raises ---

ERRORS = [
    EOFError(), KeyError("x"), IndexError("list index out of range"), TypeError("a"), AssertionError(),
    RecursionError("deep"), ZeroDivisionError("division"), struct.error("unpack"), SyntaxError("not a TIFF"),
    Exception(), OSError("image file is truncated"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"),
    OverflowError("too large"),
]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("when", ["open", "load"])
def test_whatever_a_decoder_raises_is_said_of_the_file(
    when: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    (tmp_path / "a.png").write_bytes(stored("PNG"))
    if when == "open":
        monkeypatch.setattr(Image, "open", fail)
    else:
        monkeypatch.setattr(Image.Image, "convert", fail)
    assert "is truncated or not an image (" in broken(tmp_path / "a.png")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("format", FUZZED)
def test_a_file_that_ends_early(format: str, share: float, tmp_path: Path) -> None:
    data = stored(format)
    (tmp_path / "a").write_bytes(data[: int(share * len(data))])
    try:
        assert read_photo(tmp_path / "a").shape == (16, 24, 3)  # what is lost was no pixel
    except BrokenFile as error:
        assert str(tmp_path / "a") in str(error)


def test_what_the_system_says_is_no_fault_of_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(stored("PNG"))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "a.png")

    monkeypatch.setattr(Image, "open", refuse)
    said = f"photo {tmp_path}/a.png cannot be read (Permission denied): check the file and its permissions"
    assert broken(tmp_path / "a.png") == said


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    assert "is a folder or device, not a file" in broken(tmp_path / "a.png")


def test_a_picture_too_large(tmp_path: Path) -> None:
    data = bytearray(stored("BMP"))
    data[18:26] = struct.pack("<ii", 60000, 60000)
    (tmp_path / "a.bmp").write_bytes(data)
    assert "has too many pixels (" in broken(tmp_path / "a.bmp")


def test_a_picture_that_needs_too_much_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    (tmp_path / "a.png").write_bytes(stored("PNG"))
    monkeypatch.setattr(Image.Image, "convert", fail)
    assert "has too many pixels (MemoryError): resize it" in broken(tmp_path / "a.png")


@pytest.mark.slow
def test_mutated_files(tmp_path: Path) -> None:
    """Ten thousand: each is read, or its file is named."""
    rng, file, refused = np.random.default_rng(0), tmp_path / "a", 0
    whole = [stored(format) for format in FUZZED] + [stored("TIFF", compression="tiff_lzw")]
    for number in range(10_000):
        data = bytearray(whole[number % len(whole)])
        for _ in range(rng.integers(1, 4)):
            place, length = int(rng.integers(len(data))), int(rng.integers(1, 9))
            kind = rng.integers(5)
            if kind == 0:
                data[place] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                data[place : place + length] = rng.bytes(length)
            elif kind == 2:
                del data[place : place + length]
            elif kind == 3:
                data[place:place] = rng.bytes(length)
            else:
                del data[max(place, 16) :]
        file.write_bytes(data)
        try:
            found = read_photo(file)
            assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
        except BrokenFile as error:
            assert str(file) in str(error) and "\n" not in str(error)
            refused += 1
    assert 2_000 < refused < 9_900


# --- what a folder holds ---


def names(root: Path, below: bool = True) -> list[str]:
    return sorted(str(Path(path).relative_to(root)) for path in files_in(str(root), below, []))


def each_other(root: Path) -> None:
    (root / "x").mkdir()
    (root / "x" / "y").symlink_to(root / "b")
    (root / "b" / "x").symlink_to(root / "x")


Link = Callable[[Path], None]
LINKS: dict[str, tuple[Link, list[str]]] = {
    "itself": (lambda root: (root / "loop").symlink_to("."), ["a.png", "b/c.png"]),
    "above": (lambda root: (root / "b" / "up").symlink_to(root.parent), ["a.png", "b/c.png"]),
    "each other": (each_other, ["a.png", "b/c.png"]),
    "beside": (lambda root: (root / "aa").symlink_to("b"), ["a.png", "b/c.png"]),
    "a file": (lambda root: (root / "0.png").symlink_to("a.png"), ["a.png", "b/c.png"]),
    "nothing": (lambda root: (root / "d.png").symlink_to("none.png"), ["a.png", "b/c.png", "d.png"]),
    "elsewhere": (lambda root: (root / "d").symlink_to(root.parent / "e"), ["a.png", "b/c.png", "d/f.png"]),
}  # fmt: skip


@pytest.mark.parametrize("link", LINKS)
def test_each_real_file_once(link: str, tmp_path: Path) -> None:
    """By its own name where it lies in the folder; a link to nothing is a file that is missing."""
    for name in ("root/a.png", "root/b/c.png", "e/f.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    make, expected = LINKS[link]
    make(tmp_path / "root")
    assert names(tmp_path / "root") == expected


def test_the_same_is_left_out_everywhere(tree: Tree) -> None:
    """Hidden files, and what `predict` writes."""
    tree.fill(np.random.default_rng(0), 2, 3, 5)
    for name in ("._0.png", ".x.png", "0.png.mask.png", "1.png.overlay.png", "1.png.rle.json"):
        tree.write(f"images/{name}", "no image")
    assert find_photos([tree.root / "images"]) == [tree.image_path("0"), tree.image_path("1")]
    for pattern in ("images/{id}.png", "images/{id}.*"):
        assert tree.read({"images": pattern}).ids == ["0", "1"]
    (tree.root / "images" / "2.mask.png").touch()
    assert tree.read({"images": "images/{id}.mask.png"}).ids == ["0.png", "2"]  # asked for by name


@pytest.mark.parametrize("ending", ["jfif", "jpe", "jp2", "tga", "ppm", "qoi", "hif", "apng", "dib", "pcx", "sgi"])
def test_one_list_of_endings(ending: str, tree: Tree) -> None:
    """With a split list and without one, as `predict` has it."""
    image, mask = draw_pair(np.random.default_rng(0), 16, 16)
    tree.add("a", image, mask)
    tree.image_path("a").unlink()
    file = tree.root / "images" / f"a.{ending.upper()}"
    format = {"jpe": "JPEG", "jfif": "JPEG", "hif": "HEIF", "apng": "PNG"}.get(ending)
    Image.fromarray(image).save(file, format)
    tree.write("list.txt", "a")
    assert find_photos([tree.root / "images"]) == [file]
    for split in ({}, {"ids": "list.txt"}):
        np.testing.assert_array_equal(tree.read({"images": "images/{id}.*"} | split).image(0), read_photo(file))


def test_endings_of_films_and_papers_are_none() -> None:
    assert not ENDINGS & {".mpg", ".pdf", ".h5", ".txt", ".svg", ".json"}


def test_what_is_passed_over_is_known(tree: Tree) -> None:
    tree.fill(np.random.default_rng(0), 2, 3, 5)
    tree.write("images/raw.dng")
    (tree.root / "images" / "again.png").symlink_to("0.png")
    (tree.root / "images" / "loop").symlink_to(".")
    dataset = tree.read({"images": "images/{id}.*"})
    assert dataset.ids == ["0", "1"]
    assert dataset.passed_over == [f"{tree.root}/images/{name}" for name in ("again.png", "loop", "raw.dng")]


def test_a_photo_named_twice_is_one(tmp_path: Path) -> None:
    """Nothing is passed over without a word: links, other formats and subfolders."""
    for name in ("a.png", "b.dng"):
        (tmp_path / name).touch()
    (tmp_path / "day").mkdir()
    (tmp_path / "link.png").symlink_to("a.png")
    passed_over: list[str] = []
    given = [tmp_path, tmp_path / "a.png", tmp_path / "." / "a.png", tmp_path / "link.png"]
    assert find_photos(given, passed_over) == [tmp_path / "a.png"]
    assert {Path(path).name for path in passed_over} == {"b.dng", "day", "link.png"}


def test_a_folder_that_cannot_be_listed(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.fill(np.random.default_rng(0), 2, 3, 5)
    tree.write("list.txt", "0\n1\n")

    def refuse(folder: str) -> None:
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(UserError, match=r"cannot list folder .*/images: Permission denied; check its permissions"):
        tree.read({"images": "images/{id}.*", "ids": "list.txt"}).image(0)


@pytest.mark.parametrize("ids", [{}, {"ids": "list.txt"}])
def test_images_may_share_a_mask_through_links(ids: dict[str, str], tree: Tree) -> None:
    """Only images are each read once; a repeated link to one that is listed by name is read, too."""
    tree.fill(np.random.default_rng(0), 2, 3, 5)
    tree.write("list.txt", "0\n1\n2\n" if ids else "")
    (tree.root / "images" / "2.png").symlink_to("0.png")
    for name in ("1", "2"):
        tree.mask_path(name).unlink(missing_ok=True)
        tree.mask_path(name).symlink_to("0.png")
    dataset = tree.read({"images": "images/{id}.*", "masks": "masks/{id}.*"} | ids)
    assert dataset.ids == (["0", "1", "2"] if ids else ["0", "1"])
    for row in range(len(dataset)):
        np.testing.assert_array_equal(dataset.mask(row), dataset.mask(0))
        assert dataset.image(row).shape == (3, 5, 3)


LISTED = ["0.png", "0.jpg", "images/0.png", "images/0", "./0", "0 1", "0, masks/0.png", "images\\0.png", "0.PNG"]


@pytest.mark.parametrize("pattern", ["images/{id}.*", "images/{id}.png"])
@pytest.mark.parametrize("line", LISTED)
def test_a_list_of_file_names(line: str, pattern: str, tree: Tree) -> None:
    """The line that is meant is said; "./0" happens to be right."""
    tree.fill(np.random.default_rng(0), 2, 3, 5)
    tree.write("list.txt", f"{line}\n1\n")
    dataset = tree.read({"images": pattern, "ids": "list.txt"})
    if line == "./0":
        assert dataset.image(0).shape == (3, 5, 3)
        return
    with pytest.raises(BrokenFile) as error:
        dataset.pair(0)
    assert f"the split list says {line!r}, but the id is '0' ({{id}} in {pattern})" in str(error.value)
