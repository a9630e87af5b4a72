"""Reading photos of common formats."""

import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from configs.errors import UserError
from pipeline.data.dataset import BrokenFile, opened

WRITTEN = (".overlay.png", ".mask.png", ".compare.png", ".attention.png", ".rle.json")  # beside photos, by `predict`
# Photos that Pillow refuses as a likely attack, twice this size, are refused; below that there is nothing to warn of.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def find_photos(paths: Iterable[Path]) -> list[Path]:
    """The given files, and the photos in the given folders, recognised by extension and sorted per folder.

    Files written by `predict` are excluded.

    Raises:
        UserError: a path does not exist, or a folder holds no image.
    """
    formats = Image.registered_extensions()
    endings = {ending for ending, name in formats.items() if name in Image.OPEN and name != "MPEG"}
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(
                file for file in path.iterdir()
                if file.suffix.lower() in endings and file.is_file() and not file.name.endswith(WRITTEN)
            )  # fmt: skip
            if not inside:
                raise UserError(f"{path} contains no readable photo: choose a folder of JPEG or PNG files, say")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{path}: no such photo or folder of photos")
    return found


def read_photo(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB, upright: the first frame, on white where it is transparent.

    16-bit greys keep their 8 high bits.

    Raises:
        BrokenFile: not an image, truncated, too large, or of a kind that has no range (32-bit numbers).
    """
    with opened(path, "photo") as picture:
        return upright_rgb(picture, f"photo {path}")


def upright_rgb(picture: Image.Image, name: str) -> np.ndarray:
    """`read_photo` for an open picture; errors call it `name`."""
    upright = ImageOps.exif_transpose(picture)
    if upright.mode in ("I", "F"):
        raise BrokenFile(f"{name} has 32-bit values (mode {upright.mode}): convert it to 8 bits per channel")
    if upright.mode.startswith("I;16"):
        return np.repeat((np.asarray(upright).astype(np.uint16) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    return np.asarray(upright.convert("RGB"))
