"""Photos of any kind, as people have them."""

import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from configs.errors import UserError
from pipeline.data.dataset import BrokenFile, opened

# Photos that Pillow refuses as a likely attack, twice this size, are refused; below that there is nothing to warn of.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def find_photos(paths: Iterable[Path]) -> list[Path]:
    """The files named, and those in the folders named that look like images, by their ending; sorted in a folder.

    Raises:
        UserError: a path does not exist, or a folder holds no image.
    """
    endings, found = Image.registered_extensions(), []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in endings and file.is_file())
            if not inside:
                raise UserError(f"{path} holds no image: name a folder of photos, or photos")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{path}: no such photo, or folder of photos")
    return found


def read_photo(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB, upright: the first frame, on white where it is transparent.

    16-bit greys keep their 8 high bits.

    Raises:
        BrokenFile: not an image, truncated, too large, or of a kind that has no range (32-bit numbers).
    """
    with opened(path, "photo") as picture:
        upright = ImageOps.exif_transpose(picture)
        if upright.mode.startswith("I;16"):
            return np.repeat((np.asarray(upright).astype(np.uint16) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        if upright.mode not in ("I", "F"):
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            return np.asarray(upright.convert("RGB"))
    raise BrokenFile(f"photo {path} has 32-bit values (mode {upright.mode}): convert it to 8 bits a channel")
