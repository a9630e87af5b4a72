"""Unusual inputs, each with its expected verdict: the rows of the table in docs/datasets.md.

To add one, add a line to a list below. A new kind of input needs a new list, and a test in test_odd.py.
"""

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

VERDICTS = {
    "read": "all commands accept it",
    "warned": "all commands accept it, and `datasets check` prints a warning, as it may be intended",
    "named": "an error that names the file. `datasets check` reports it, `evaluate` stops, `precompute` stops or, with "
    "`--on-error skip`, skips it; training and `predict` skip it",
    "refused": "one line and exit code 2, before any work",
}
CLASSES = ["sky", "grass", "cow", "road"]
COLOURS = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [0, 0, 128]]
PICTURE = np.dstack([np.add.outer(np.arange(60) * 2, np.arange(80)), *np.indices((60, 80)) * 3]).astype(np.uint8)
TRUTH = np.kron(np.arange(12).reshape(3, 4) % 4, np.ones((20, 20))).astype(np.uint8)  # (60, 80), without symmetry


@dataclass(frozen=True)
class Odd:
    """A row of the table; `says` is a part of the line that is printed."""

    what: str
    verdict: str
    says: str = ""


@dataclass(frozen=True)
class File(Odd):
    """A photo or a mask among others. `make` writes it; `name` is its extension, or its whole name."""

    make: Callable[[Path], Any] = Path.touch
    name: str = "png"
    mask: bool = False


@dataclass(frozen=True)
class Tree(Odd):
    """A dataset of six photos and masks that `make` changes. `split` and `settings` go to its YAML."""

    make: Callable[[Path], Any] = lambda root: None
    split: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings(Odd):
    """Keys of the dataset's YAML."""

    changes: dict[str, Any] = field(default_factory=dict)
    yaml: str = ""  # lines that cannot be written as a dictionary


@dataclass(frozen=True)
class Words(Odd):
    """The argument of `predict --classes`; `file` is the content of words.txt."""

    words: str = "words.txt"
    file: bytes = b"sky"


def save(
    mode: str = "RGB", pixels: np.ndarray = PICTURE, format: str | None = None, **options: Any
) -> Callable[[Path], None]:
    def make(file: Path) -> None:
        Image.fromarray(pixels).convert(mode).save(file, format, **options)

    return make


def array(pixels: np.ndarray, format: str | None = None, **options: Any) -> Callable[[Path], None]:
    return lambda file: Image.fromarray(pixels).save(file, format, **options)


def tag(pixels: np.ndarray, orientation: int, format: str | None = None) -> Callable[[Path], None]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return array(np.ascontiguousarray(pixels), format, exif=exif)


def data(content: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(content)


def cut(format: str, share: float = 0.5) -> Callable[[Path], object]:
    def make(file: Path) -> None:
        whole = BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)).save(whole, format)
        file.write_bytes(whole.getvalue()[: int(share * len(whole.getvalue()))])

    return make


def giant(file: Path) -> None:
    save()(file)
    header = bytearray(file.read_bytes())
    header[18:26] = struct.pack("<ii", 60000, 60000)
    file.write_bytes(header)


def colours(pixels: np.ndarray, order: list[int] = [0, 1, 2, 3]) -> Callable[[Path], None]:  # noqa: B006
    """A palette mask whose palette has the colours of the classes in this order."""

    def make(file: Path) -> None:
        picture = Image.fromarray(pixels)
        picture.putpalette(np.array(COLOURS, np.uint8)[order].tobytes())
        picture.save(file)

    return make


BAD = "is truncated or not an image"
GREY = PICTURE[..., 0]
CLEAR = np.dstack([PICTURE, np.where(np.arange(80) < 30, 0, 255)[None] * np.ones((60, 1))]).astype(np.uint8)

PHOTOS = [
    File("a grey JPEG", "read", make=save("L"), name="jpg"),
    File("a CMYK JPEG", "read", make=save("CMYK"), name="jpg"),
    File("a 1-bit PNG", "read", make=save("1")),
    File("a PNG with a palette", "read", make=save("P")),
    File("a transparent PNG: shown on white", "read", make=array(CLEAR)),
    File("a grey PNG with transparency", "read", make=array(CLEAR[..., [0, 3]])),
    File("a 16-bit grey PNG: the high 8 bits are read", "read", make=array(GREY.astype(np.uint16) * 257)),
    File("an animated GIF: the first frame is read", "read", make=save(save_all=True, append_images=[]), name="gif"),
    File("WebP", "read", make=save(), name="webp"),
    File("AVIF", "read", make=save(), name="avif"),
    File("HEIC, as phones make it", "read", make=save(format="HEIF"), name="HEIC"),
    File("TIFF", "read", make=save(), name="tif"),
    File("BMP", "read", make=save(), name="bmp"),
    File("a rare extension: JFIF", "read", make=save(format="JPEG"), name="jfif"),
    File("a rare extension: JPEG 2000", "read", make=save(), name="jp2"),
    File("a rare extension: TGA", "read", make=save(), name="tga"),
    File("a rare extension: PPM", "read", make=save(), name="ppm"),
    File("a JPEG named .png", "read", make=save(format="JPEG")),
    File("an extension in capitals", "read", make=save(), name="JPG"),
    File("a name with spaces and signs", "read", make=save(), name="a b [red]&'%20.png"),
    File("a name in other alphabets", "read", make=save(), name="Überführung 写真.png"),
    File("a name of 250 bytes: too long for output of `predict`", "read", make=save(), name="x" * 246 + ".png"),
    File("a photo with an orientation tag of 90 degrees", "read", "", tag(np.rot90(PICTURE), 6, "JPEG"), "jpg"),
    File("a photo with a tag of 180 degrees, its mask without", "warned",
         "a different orientation tag", tag(PICTURE[::-1, ::-1], 3, "JPEG"), "jpg"),
    File("an empty photo", "named", BAD, data(b"")),
    File("a text file named like a photo", "named", BAD, data(b"this is no image\n" * 20)),
    File("an SVG file named like a photo", "named", BAD, data(b"<svg xmlns='http://www.w3.org/2000/svg'/>")),
    File("a JPEG that is cut off", "named", BAD, cut("JPEG"), "jpg"),
    File("a PNG that is cut off", "named", BAD, cut("PNG")),
    File("a TIFF that is cut off", "named", BAD, cut("TIFF"), "tif"),
    File("a WebP that is cut off", "named", BAD, cut("WEBP"), "webp"),
    File("a HEIC that is cut off", "named", BAD, cut("HEIF"), "heic"),
    File("a HEIC that is cut off in its header", "named", BAD, cut("HEIF", 0.02), "heic"),
    File("an AVIF that is cut off", "named", BAD, cut("AVIF"), "avif"),
    File("a photo of 60,000 x 60,000 pixels", "named", "has too many pixels", giant, "bmp"),
    File("a photo with 32-bit values", "named", "has 32-bit values", array(GREY.astype(np.float32)), "tif"),
    File("a folder named like a photo", "named", "is a folder or device", Path.mkdir),
    File("a named pipe", "named", "is a folder or device", lambda file: os.mkfifo(file)),
    File("a link to a missing photo", "named", "missing image", lambda file: file.symlink_to("none.png")),
    File("a photo that is listed but missing", "named", "missing image", lambda file: None),
]  # fmt: skip

MASKS = [
    File("a mask with a palette", "read", make=colours(TRUTH)),
    File("a mask as TIFF", "read", make=array(TRUTH), name="tif"),
    File("a mask as BMP", "read", make=array(TRUTH), name="bmp"),
    File("a mask with its own orientation tag of 90 degrees", "read", make=tag(np.rot90(TRUTH), 6)),
    File("a mask with a tag of 180 degrees, its photo without", "warned",
         "a different orientation tag", tag(TRUTH[::-1, ::-1], 3)),
    File("a mask that is missing", "named", "missing mask", lambda file: None),
    File("an empty mask", "named", BAD, data(b"")),
    File("a mask that is cut off", "named", BAD, cut("PNG")),
    File("a mask as JPEG", "named", "is saved as JPEG", array(TRUTH * 60), "jpg"),
    File("a mask as JPEG, named .png", "named", "is saved as JPEG", array(TRUTH * 60, "JPEG")),
    File("a mask as WebP", "named", "is saved as WEBP", save(pixels=TRUTH), "webp"),
    File("a mask as HEIC", "named", "is saved as HEIF", save(pixels=TRUTH, format="HEIF"), "heic"),
    File("a mask as TIFF with JPEG compression", "named", "is saved as jpeg",
         array(TRUTH, compression="jpeg"), "tif"),
    File("a mask with colours, without a list of them", "named", "RGB with colours as `values`",
         array(np.array(COLOURS, np.uint8)[TRUTH])),
    File("a 16-bit mask", "read", make=array(TRUTH.astype(np.uint16))),
    File("a 16-bit mask of values times 257", "named", "holds 257", array(TRUTH * np.uint16(257))),
    File("a 32-bit mask", "named", "has mode I", array(TRUTH.astype(np.int32), "TIFF")),
    File("a 1-bit mask", "named", "has mode 1", array(TRUTH > 1)),
    File("a mask with transparency", "named", "has mode LA", array(CLEAR[..., [0, 3]])),
    File("a mask value that is not a class", "named", "holds 4, which is neither a class", array(TRUTH + 1)),
    File("a mask of another size than its photo", "named", "both must have the same size", array(TRUTH[:-1])),
    File("a rotated mask without a tag", "named", "both must have the same size", array(np.rot90(TRUTH))),
    File("a mask whose palette has another order of colours", "named", "has a different palette from",
         colours(3 - TRUTH, [3, 2, 1, 0])),
]  # fmt: skip
MASKS = [File(odd.what, odd.verdict, odd.says, odd.make, odd.name, mask=True) for odd in MASKS]

IGNORED = "are ignored, because of their extension or as repeated links"
LISTED = {"ids": "train.txt"}
WRONG = "the split list says"
TREES = [
    Tree("a split list with extensions (train-0.jpg)", "named", WRONG,
         lambda root: (root / "train.txt").write_text("train-0.jpg\ntrain-1\n"), LISTED),
    Tree("a split list with folders (photos/train-0.jpg)", "named", WRONG,
         lambda root: (root / "train.txt").write_text("photos/train-0.jpg\ntrain-1\n"), LISTED),
    Tree("a split list with two columns", "named", WRONG,
         lambda root: (root / "train.txt").write_text("train-0.jpg train-0.png\ntrain-1\n"), LISTED),
    Tree("a split list from Windows", "read", "",
         lambda root: (root / "train.txt").write_bytes(b"\xef\xbb\xbftrain-0\r\n\r\ntrain-1\r\n"), LISTED),
    Tree("a split list that is missing", "refused", "cannot read the split list", split={"ids": "none.txt"}),
    Tree("a split list that is empty", "refused", "is empty",
         lambda root: (root / "train.txt").write_text("\n"), LISTED),
    Tree("a split list that is not UTF-8", "refused", "it is no UTF-8 text",
         lambda root: (root / "train.txt").write_bytes(b"caf\xe9\n"), LISTED),
    Tree("a split list with an id twice", "refused", "more than once",
         lambda root: (root / "train.txt").write_text("train-0\ntrain-0\n"), LISTED),
    Tree("`._train-0.jpg`, as written by macOS", "read", "",
         lambda root: (root / "photos" / "._train-0.jpg").write_bytes(b"\0\5\x16\7")),
    Tree("a hidden folder", "read", "", lambda root: (
        (root / "photos" / ".cache").mkdir(), (root / "photos" / ".cache" / "a.jpg").touch())),
    Tree("output of `predict` next to the photos", "read", "", lambda root: (
        save(pixels=TRUTH)(root / "photos" / "train-0.jpg.mask.png"),
        save()(root / "photos" / "train-0.jpg.overlay.png"))),
    Tree("a file of another format next to the photos (DNG)", "warned", IGNORED,
         lambda root: (root / "photos" / "train-0.dng").touch()),
    Tree("a link to a folder inside itself", "warned", IGNORED,
         lambda root: (root / "photos" / "again").symlink_to(".")),
    Tree("a second link to a photo", "warned", IGNORED,
         lambda root: (root / "photos" / "again.jpg").symlink_to("train-0.jpg")),
    Tree("a mask that several photos share through links", "read", "", lambda root: (
        (root / "masks" / "train-0.png").unlink(), (root / "masks" / "train-0.png").symlink_to("train-1.png"))),
    Tree("two photos with the same id", "named", "have the same id: keep one",
         lambda root: save()(root / "photos" / "train-0.png")),
    Tree("a name in another encoding", "read", "", lambda root: [
        os.rename(root / folder / f"train-0.{ending}", os.fsencode(root / folder) + b"/caf\xe9." + ending.encode())
        for folder, ending in (("photos", "jpg"), ("masks", "png"))]),
    Tree("masks with different palettes, and `values`", "warned", "a different palette from the first", lambda root: [
        colours(TRUTH, order)(root / "masks" / f"train-{number}.png")
        for number, order in enumerate(([0, 1, 2, 3], [1, 0, 2, 3]))], settings={"values": "0-3"}),
    Tree("masks with colours, and a list of them", "read", "", lambda root: [
        array(np.array(COLOURS, np.uint8)[TRUTH])(mask) for mask in root.rglob("masks/*.png")],
        settings={"values": COLOURS}),
    Tree("no folder of photos", "refused", "no folder", lambda root: (root / "photos").rename(root / "pictures")),
    Tree("no photo in the folder", "refused", "holds no file", split={"images": "photos/{id}.bmp"}),
]  # fmt: skip

QUOTES = "put it in quotes"
SETTINGS = [
    Settings("`classes: [yes, no]`", "refused", QUOTES, yaml="classes: [yes, no]"),
    Settings("`classes: [1, 2]`", "refused", QUOTES, yaml="classes: [1, 2]"),
    Settings("`classes: [sky, ~]`", "refused", QUOTES, yaml="classes: [sky, ~]"),
    Settings("`classes: [2020-01-01]`", "refused", QUOTES, yaml="classes: [2020-01-01]"),
    Settings("`name: 2012`", "refused", QUOTES, yaml="name: 2012"),
    Settings("`unseen: [no]`", "refused", QUOTES, yaml="unseen: [no]"),
    Settings("`values: 3` for four classes", "refused", "values 3 has 1 values for 4 classes", yaml="values: 3"),
    Settings("`values: 1.5`", "refused", "write numbers and ranges", yaml="values: 1.5"),
    Settings("a colour twice in `values`", "refused", "distinct colours", {"values": [[0, 0, 0]] * 4}),
    Settings("a class `car|truck`", "refused", "contain |", {"classes": [*CLASSES[:3], "car|truck"]}),
    Settings('a class `"sky "`', "refused", "have outer spaces", {"classes": ["sky ", *CLASSES[1:]]}),
    Settings('a class `""`', "refused", "must not be empty", {"classes": ["", *CLASSES[1:]]}),
    Settings("a class with a line break", "refused", "or a line break", {"classes": ["a\nb", *CLASSES[1:]]}),
    Settings("a class twice", "refused", "lists 'sky' twice", {"classes": ["sky", *CLASSES[:3]]}),
    Settings("an empty prompt", "refused", "must not be empty", {"prompts": {"cow": [""]}}),
    Settings("a missing list of classes", "refused", "cannot read the class names", {"classes": "nmaes.txt"}),
    Settings("a misspelt key", "refused", "unknown setting clases", yaml="clases: [a]"),
    Settings("a key twice", "refused", "stands twice", yaml="root: a\nroot: b"),
]

WORDS = [
    Words("`--classes nmaes.txt`, a misspelt file", "refused", "no such text file", "nmaes.txt"),
    Words("the same, followed by a space", "refused", "no such text file", "nmaes.txt "),
    Words("`--classes data/names`, a missing file", "refused", "no such text file", "data/names"),
    Words("`--classes data/`, a folder", "refused", "no such text file", "data/"),
    Words('`--classes "sky,,cow"`', "refused", "must not be empty", "sky,,cow"),
    Words('`--classes "sky|"`', "refused", "must not be empty", "sky|"),
    Words("a word twice", "refused", "is listed twice", "sky, sky"),
    Words("a file of words that is not UTF-8", "refused", "is not a UTF-8 text file", file=b"caf\xe9"),
    Words("a file of words from Windows", "read", file=b"\xef\xbb\xbfsky\r\n\r\ncow\r\n"),
]

ALL: list[Odd] = [*PHOTOS, *MASKS, *TREES, *SETTINGS, *WORDS]


def table() -> str:
    """As docs/datasets.md has it."""
    cells = [("input", "verdict", "what is said"), ("---",) * 3, *((odd.what, odd.verdict, odd.says) for odd in ALL)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)
