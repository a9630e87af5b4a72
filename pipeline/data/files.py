"""Picture files: which a folder holds, and the one way from a file to pixels that all verbs take."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from pillow_heif import register_heif_opener

from configs.errors import UserError, reason

register_heif_opener()
_NO_PHOTOS = {"MPEG", "HDF5", "BUFR", "GRIB", "WMF", "IPTC"}  # films, and what Pillow knows but cannot read
ENDINGS = frozenset(
    ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN and name not in _NO_PHOTOS
)
WRITTEN = (".overlay.png", ".mask.png", ".compare.png", ".attention.png", ".rle.json")  # beside photos, by `predict`
warnings.filterwarnings("ignore", module=r"PIL\.")  # of tags that nobody asked for, and of sizes that can be read


class BrokenFile(UserError):
    """An image or mask that is missing, damaged, mis-sized or out of range: `--on-error skip` can leave it out."""


def files_in(folder: str, below: bool, again: list[str], ending: str = "") -> Iterator[str]:
    """Paths of the files in the folder, or below it too; each real file once, links to it go to `again`.

    Left out are hidden ones (macOS puts `._x.jpg` beside `x.jpg`), and what `predict` writes unless `ending` is of it.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot list the folder {error.filename}: {error.strerror}; mend its permissions") from error

    todo, links, seen, top = [folder], list[str](), set[str](), os.path.realpath(folder)
    for start in todo:  # it grows by links to folders: what lies in the folder itself keeps its own name
        for path, folders, names in os.walk(start, onerror=refuse):
            real = os.path.realpath(path)
            if real in seen or (path != folder and f"{top}/".startswith(f"{real}/")):  # round in a circle
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
    """By its ending: whatever can be read."""
    return os.path.splitext(name)[1].lower() in ENDINGS


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Whatever a decoder raises within the block, of any type, is the file's fault and ends in BrokenFile."""
    try:
        yield
    except BrokenFile:
        raise
    except Image.DecompressionBombError as error:
        raise BrokenFile(f"{name} has too many pixels to be read ({reason(error)}): make it smaller") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # the system's word, not a decoder's
            raise BrokenFile(f"{name} cannot be read ({error.strerror}): mend the file or its permissions") from error
        raise BrokenFile(f"{name} is truncated or not an image ({reason(error)}): replace the file") from error


@contextmanager
def opened(path: Path, kind: str) -> Iterator[Image.Image]:
    """A picture whose decoding, within the block, ends in BrokenFile if it fails."""
    if not os.path.exists(path):
        raise BrokenFile(f"missing {kind} {path}: add it, or mend the link")
    if not os.path.isfile(path):  # to open a pipe would wait for ever
        raise BrokenFile(f"{kind} {path} is a folder or device, not a file: replace it")
    with decoding(f"{kind} {path}"), Image.open(path) as picture:
        yield picture


def rgb(picture: Image.Image, name: str) -> np.ndarray:
    """(H, W, 3) uint8, upright: the first frame, on white where it is transparent; `name` is what errors call it.

    16-bit greys keep their 8 high bits. BrokenFile if it cannot be decoded, or has no range (32-bit numbers).
    """
    with decoding(name):
        upright = ImageOps.exif_transpose(picture)
        if upright.mode in ("I", "F"):
            raise BrokenFile(f"{name} has 32-bit values (mode {upright.mode}): convert it to 8 bits a channel")
        if upright.mode.startswith("I;16"):
            return np.repeat((np.asarray(upright).astype(np.uint16) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        return np.asarray(upright.convert("RGB"))
