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
Image.init()
_NO_PHOTOS = {"MPEG", "HDF5", "BUFR", "GRIB", "WMF", "IPTC"}  # films, and what Pillow knows but cannot read
ENDINGS = frozenset(
    ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN and name not in _NO_PHOTOS
)
WRITTEN = (".overlay.png", ".mask.png", ".compare.png", ".attention.png", ".rle.json")  # beside photos, by `predict`
# Pictures that Pillow refuses as a likely attack, twice this size, are refused; below that there is nothing to warn of.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class BrokenFile(UserError):
    """An image or mask that is missing, damaged, mis-sized or out of range: `--on-error skip` can leave it out."""


def files_in(folder: str, below: bool = False, ending: str = "", again: list[str] | None = None) -> Iterator[str]:
    """Paths of the files in the folder, or below it too; each real file once, however many links lead to it.

    Left out are hidden ones (macOS puts `._x.jpg` beside `x.jpg`), and what `predict` writes unless `ending` is of it.

    Args:
        again: takes the links to what is there already.

    Raises:
        UserError: a folder cannot be listed.
    """
    again = [] if again is None else again
    folders, links, seen, aliases = [folder], list[str](), set[str](), list[str]()
    while folders or links:  # links last: what they lead to keeps its own name where it has one
        path = folders.pop() if folders else links.pop()
        real = os.path.realpath(path)
        if real in seen:
            again.append(path)
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"cannot list the folder {path}: {error.strerror}; mend its permissions") from error
        for entry in entries:
            if entry.name.startswith(".") or (entry.name.endswith(WRITTEN) and not ending.endswith(WRITTEN)):
                continue
            if entry.is_dir():
                if below and entry.is_symlink() and f"{real}/".startswith(f"{os.path.realpath(entry)}/"):
                    again.append(entry.path)  # it leads to a folder that it lies in, round in a circle
                elif below:
                    (links if entry.is_symlink() else folders).append(entry.path)
            elif entry.is_symlink():
                aliases.append(entry.path)
            else:
                seen.add(f"{real}/{entry.name}")
                yield entry.path
    for path in sorted(aliases):
        real = os.path.realpath(path)
        if real in seen:
            again.append(path)
        else:
            seen.add(real)
            yield path


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
    with decoding(f"{kind} {path}"):
        if os.path.exists(path) and not os.path.isfile(path):  # to open a pipe would wait for ever
            raise BrokenFile(f"{kind} {path} is a folder or device, not a file: replace it")
        try:
            picture = Image.open(path)
        except FileNotFoundError as error:
            raise BrokenFile(f"missing {kind} {path}: add it, or mend the link") from error
        with picture:
            yield picture


def rgb(picture: Image.Image, name: str) -> np.ndarray:
    """(H, W, 3) uint8, upright: the first frame, on white where it is transparent; `name` is what errors call it.

    16-bit greys keep their 8 high bits.

    Raises:
        BrokenFile: it cannot be decoded, or is of a kind that has no range (32-bit numbers).
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
