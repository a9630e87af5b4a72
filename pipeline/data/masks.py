"""Reads the classes of a mask file from grey values, palette indices or colours.

Masks in memory are 8-bit, or 16-bit if there are more than 255 classes. Their highest value is that of pixels without a
class. Training, and everything before it, knows 8-bit masks alone.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from configs.dataset import Dataset
from configs.dataset import ignore_index as ignore_index
from pipeline.data.files import BrokenFile, opened

IGNORE = 255  # in 8-bit masks
_LOSSY = {"JPEG", "MPO", "JPEG2000", "HEIF", "AVIF", "WEBP", "jpeg", "tiff_jpeg", "webp"}  # the last three inside TIFF
_NUMBERS = ("L", "P", "I;16", "I;16B", "I;16L", "I;16N")  # modes with a number at each pixel
_SPREAD = {"L;2": 85, "L;4": 17}  # Pillow spreads grey values of 2 and 4 bits over 0..255
Palette = tuple[Path, np.ndarray]  # a file and its (K, 3) uint8 colours


class MaskReader:
    """Reads masks coded by `values`."""

    def __init__(self, config: Dataset, values: str | None) -> None:
        codes = config.value_of_class(values)
        self._name, self._by_colour, self._coding = config.name, isinstance(codes[0], str), config.coding
        self._meant = values is not None or config.values is not None
        self._modes = ("RGB",) if self._coding else ("L", "P", "RGB", "RGBA") if self._by_colour else _NUMBERS
        self._none = ignore_index(len(codes))
        rest, kind = self._none if "others" in config.ignore_index else -1, np.int16 if self._none < 2**15 else np.int32
        ignored = [value for value in config.ignore_index if value != "others"]
        self._lookup = np.full(2**24 if self._by_colour else 2**16, rest, kind)
        number = {value: int(str(value).replace("#", "0x"), 0) for value in (*codes, *ignored)}
        self._lookup[[number[v] for v in ignored if isinstance(v, str) == self._by_colour]] = self._none
        self._lookup[[number[v] for v in codes]] = np.arange(len(codes))

    def __call__(self, path: Path, first_palette: Callable[[], Palette]) -> np.ndarray:
        """(H, W) class indices, `ignore_index` where there is none; the mask's own orientation tag is applied.

        BrokenFile if it cannot be decoded, has a lossy format, a value that is neither a class nor ignored, or a
        palette that contradicts `first_palette`.
        """
        with opened(path, "mask") as picture:
            kind = str(picture.info.get("compression") if picture.format == "TIFF" else picture.format)
            if kind in _LOSSY:
                raise BrokenFile(f"mask {path} is saved as {kind}, which changes classes: create it again as PNG")
            spread = max((_SPREAD.get(tile[3], 1) for tile in getattr(picture, "tile", ())), default=1)
            upright = ImageOps.exif_transpose(picture)
            codes = self._codes(upright, path) // spread
        mask = self._lookup[codes]
        wrong = np.unique(codes[mask < 0])
        if len(wrong):
            shown = ", ".join(f"#{code:06x}" if self._by_colour else str(code) for code in wrong[:10].tolist())
            more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
            raise BrokenFile(
                f"mask {path} holds {shown}{more}, which is neither a class nor ignored: correct the file, or "
                f"`values` and `ignore_index` of dataset {self._name}"
            )
        if not self._meant and (clash := self.clash(path, upright, first_palette)):
            raise BrokenFile(f"{clash}; use one palette, or, if the indices are classes, set `values`")
        return mask.astype(np.min_scalar_type(self._none))

    def _codes(self, picture: Image.Image, path: Path) -> np.ndarray:
        """(H, W) indices into the lookup; a colour is red * 65536 + green * 256 + blue."""
        if picture.mode not in self._modes:
            wanted = "8- or 16-bit, with one class value per pixel, or RGB with colours as `values`"
            if self._coding or self._by_colour:
                wanted = f"RGB, for `coding: {self._coding}`" if self._coding else "RGB, as `values` are colours"
            raise BrokenFile(f"mask {path} has mode {picture.mode}: masks must be {wanted}")
        if self._coding:
            red, green, _ = np.moveaxis(np.asarray(picture).astype(np.uint16), 2, 0)
            return red // 10 * 256 + green
        if not self._by_colour:
            return np.asarray(picture)
        if picture.has_transparency_data and np.asarray(picture.convert("RGBA"))[..., 3].min() < 255:
            raise BrokenFile(f"mask {path} has transparent pixels, which have no colour: save it as RGB")
        return np.asarray(picture.convert("RGB")).astype(np.int32) @ np.array([65536, 256, 1], np.int32)

    def clash(self, path: Path, picture: Image.Image, first_palette: Callable[[], Palette]) -> str:
        """How the palette contradicts the first one in an index that this mask uses; "" if it does not.

        If a program made each palette from the colours of its file, an index has a different meaning in every file.
        """
        if picture.mode != "P" or self._by_colour:
            return ""
        own, (first, known) = colours(picture), first_palette()
        for i in np.flatnonzero(np.bincount(np.asarray(picture).ravel())):
            # Black after index 0 is usually padding.
            if i < min(len(own), len(known)) and (own[i] != known[i]).any() and (i == 0 or known[i].any()):
                differs = f"index {i} is #{bytes(own[i]).hex()} instead of #{bytes(known[i]).hex()}"
                return f"mask {path} has a different palette from {first}: {differs}"
        return ""


def colours(picture: Image.Image) -> np.ndarray:
    """(K, 3) uint8, the palette."""
    return np.array(picture.getpalette() or [], np.uint8).reshape(-1, 3)


def orientation(picture: Image.Image) -> int:
    """The EXIF tag, 1 to 8; 1 if there is none. Also for HEIC, which is rotated when opened."""
    tag = picture.info.get("original_orientation") or picture.getexif().get(0x0112)
    return tag if isinstance(tag, int) and 1 <= tag <= 8 else 1
