"""Image files: which ones a folder holds, and how all commands read their pixels."""

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image, ImageOps
from pillow_heif import register_heif_opener

from configs.errors import UserError, reason

register_heif_opener()
_NO_PHOTOS = {"MPEG", "HDF5", "BUFR", "GRIB", "WMF", "IPTC"}  # films, and formats that Pillow knows but cannot read
ENDINGS = frozenset(
    ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN and name not in _NO_PHOTOS
)
WRITTEN = (".overlay.png", ".mask.png", ".compare.png", ".attention.png", ".rle.json")  # extensions of `predict`
warnings.filterwarnings("ignore", module=r"PIL\.")  # about unused tags, and sizes that can be read


class BrokenFile(UserError):
    """An image or mask that is missing, damaged, mis-sized or out of range; `--on-error skip` skips it."""


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"cannot list folder {error.filename}: {error.strerror}; check its permissions") from error


def listing(folder: str) -> list[str]:
    """Sorted names in the folder, none if it does not exist. UserError if it cannot be listed."""
    try:
        return sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    except OSError as error:
        _refuse(error)


def files_in(folder: str, below: bool, again: list[str], ending: str = "") -> Iterator[str]:
    """Paths of the files in the folder, or also below it. Each real file once; further links to it go to `again`.

    Hidden files are ignored (macOS writes `._x.jpg` next to `x.jpg`), and output of `predict`, unless `ending` is one
    of its extensions.
    """
    todo, links, seen, top = [folder], list[str](), set[str](), os.path.realpath(folder)
    for start in todo:  # grows by links to folders, read last: files in the folder itself keep their own names
        for path, folders, names in os.walk(start, onerror=_refuse):
            real = os.path.realpath(path)
            if real in seen or (path != folder and f"{top}/".startswith(f"{real}/")):  # a circle
                again.append(path)
                folders.clear()
                continue
            folders[:] = sorted(name for name in folders if below and not name.startswith("."))
            todo += [link for name in folders if os.path.islink(link := os.path.join(path, name))]
            seen.add(real)
            for name in names:
                if name.startswith(".") or (name.endswith(WRITTEN) and not ending.endswith(WRITTEN)):
                    continue
                file = os.path.join(path, name)
                if os.path.islink(file):
                    links.append(file)
                else:
                    seen.add(f"{real}/{name}")
                    yield file
    for link in sorted(links):
        if (real := os.path.realpath(link)) in seen:
            again.append(link)
        else:
            seen.add(real)
            yield link


def is_picture(name: str) -> bool:
    """Whether the extension is that of a format that can be read."""
    return os.path.splitext(name)[1].lower() in ENDINGS


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Any exception of a decoder inside the block, of any type, becomes BrokenFile."""
    try:
        yield
    except BrokenFile:
        raise
    except (Image.DecompressionBombError, MemoryError) as error:
        raise BrokenFile(f"{name} has too many pixels ({reason(error)}): resize it") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # from the system, not from a decoder
            raise BrokenFile(f"{name} cannot be read ({error.strerror}): check the file and its permissions") from error
        raise BrokenFile(f"{name} is truncated or not an image ({reason(error)}): replace the file") from error


@contextmanager
def opened(path: Path, kind: str) -> Iterator[Image.Image]:
    """Open an image; errors while decoding it inside the block become BrokenFile."""
    with decoding(name := f"{kind} {path}"):
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
            raise BrokenFile(f"{name} is a folder or device, not a file: replace it")
        with Image.open(path) as picture:
            yield picture


def rgb(picture: Image.Image, name: str) -> np.ndarray:
    """(H, W, 3) uint8: the first frame, upright, transparent pixels on white. Errors call it `name`.

    16-bit grey keeps its high 8 bits. BrokenFile if it cannot be decoded, or has 32-bit values, whose range is unknown.
    """
    with decoding(name):
        upright = ImageOps.exif_transpose(picture)
        if upright.mode in ("I", "F"):
            raise BrokenFile(f"{name} has 32-bit values (mode {upright.mode}): convert it to 8 bits per channel")
        if upright.mode.startswith("I;16"):
            return np.repeat((np.asarray(upright).astype(np.uint16) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        return np.asarray(upright.convert("RGB"))
