"""What the pixels of a mask file mean: its classes, by grey value, palette index or colour."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from configs.dataset import Dataset, Masks
from pipeline.data.files import BrokenFile, opened

IGNORE = 255
LOSSY = {"JPEG", "MPO", "JPEG2000", "HEIF", "AVIF", "WEBP"}
_SPREAD = {"L;2": 85, "L;4": 17}  # Pillow spreads grey values of 2 and 4 bits over 0..255
Palette = tuple[Path, np.ndarray]  # of this file, (K, 3) uint8


class MaskReader:
    """Reads the masks of one pattern."""

    def __init__(self, config: Dataset, masks: Masks) -> None:
        values = config.value_of_class(masks.values)
        self._name, self._by_colour = config.name, isinstance(values[0], str)
        self._by_default = masks.values is None and config.values is None
        self._lookup = np.full(2**24 if self._by_colour else 256, -1, np.int16)
        ignored = [value for value in config.ignore_index if isinstance(value, str) == self._by_colour]
        self._lookup[_codes(ignored)] = IGNORE
        self._lookup[_codes(values)] = np.arange(len(config.classes))

    def __call__(self, path: Path, first_palette: Callable[[], Palette | None]) -> np.ndarray:
        """(H, W) uint8, class indices, IGNORE where there is none; turned upright by a tag of its own.

        Args:
            first_palette: that of the first mask of this pattern that has one.

        Raises:
            BrokenFile: it cannot be decoded; its kind may have changed pixels; a value or colour means nothing.
        """
        with opened(path, "mask") as picture:
            kind = str(picture.info.get("compression", "")) if picture.format == "TIFF" else picture.format
            if kind in LOSSY or kind in ("jpeg", "tiff_jpeg", "webp"):
                raise BrokenFile(f"mask {path} is saved as {kind}, which changes pixels' classes: make it anew as PNG")
            spread = max((_SPREAD.get(tile[3], 1) for tile in getattr(picture, "tile", ())), default=1)
            upright = ImageOps.exif_transpose(picture)
            codes = self._colours(upright, path) if self._by_colour else self._numbers(upright, path) // spread
        mask = self._lookup[codes]
        wrong = np.unique(codes[mask < 0])
        if len(wrong):
            shown = [f"#{code:06x}" if self._by_colour else str(code) for code in wrong[:10].tolist()]
            more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
            raise BrokenFile(
                f"mask {path} holds {', '.join(shown)}{more}, which is no class and not ignored: correct the file, or "
                f"`values` and `ignore_index` of dataset {self._name}"
            )
        if self._by_default and (clash := self.clash(path, upright, first_palette)):
            raise BrokenFile(f"{clash}: make it anew by one palette, or, if indices are classes, say so by `values`")
        return mask.astype(np.uint8)

    def clash(self, path: Path, picture: Image.Image, first_palette: Callable[[], Palette | None]) -> str:
        """How the palette contradicts the first one in an index that the mask uses; "" if it does not.

        Each file has a palette of its own where a program chose it by the colours that it found: an index then means
        something else in every file.
        """
        if picture.mode != "P" or self._by_colour or not (first := first_palette()):
            return ""
        own = palette_of(picture)
        used = [index for index in np.unique(np.asarray(picture)) if index < min(len(own), len(first[1]))]
        # Black after index 0 is most often filling.
        different = [i for i in used if (own[i] != first[1][i]).any() and (i == 0 or first[1][i].any())]
        if not different:
            return ""
        index = different[0]
        return (
            f"mask {path} has another palette than {first[0]}: {index} is #{bytes(own[index]).hex()} here and "
            f"#{bytes(first[1][index]).hex()} there"
        )

    def _numbers(self, picture: Image.Image, path: Path) -> np.ndarray:
        if picture.mode not in ("L", "P"):
            colours = ", or give `values` as a list of colours" if picture.mode in ("RGB", "RGBA") else ""
            raise BrokenFile(
                f"mask {path} has mode {picture.mode}: masks must be 8-bit, one class value a pixel{colours}"
            )
        return np.asarray(picture)

    def _colours(self, picture: Image.Image, path: Path) -> np.ndarray:
        """(H, W) int32, red * 65536 + green * 256 + blue."""
        if picture.mode not in ("L", "P", "RGB", "RGBA"):
            raise BrokenFile(f"mask {path} has mode {picture.mode}: masks by colour must be RGB of 8 bits a channel")
        if picture.has_transparency_data and np.asarray(picture.convert("RGBA"))[..., 3].min() < 255:
            raise BrokenFile(f"mask {path} is transparent in places, which have no colour: save it as RGB")
        return np.asarray(picture.convert("RGB")).astype(np.int32) @ np.array([65536, 256, 1], np.int32)


def palette_of(picture: Image.Image) -> np.ndarray:
    return np.array(picture.getpalette() or [], np.uint8).reshape(-1, 3)


def _codes(values: list[int] | list[str] | list[int | str]) -> list[int]:
    return [int(value[1:], 16) if isinstance(value, str) else value for value in values]


def orientation(picture: Image.Image) -> int:
    """The EXIF tag, 1 to 8, 1 for none; that of a HEIC picture, which is upright as soon as it is open, too."""
    return int(picture.info.get("original_orientation") or picture.getexif().get(0x0112, 1))
