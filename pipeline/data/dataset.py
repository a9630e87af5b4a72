"""Reads images and masks of one split of any dataset. Errors are one line that names the file.

Masks on disk contain all classes. Unseen classes are hidden here and nowhere else: `training_pair` returns the only
mask that training sees (generalised zero-label: unseen pixels become "ignored").
"""

import glob
import hashlib
import json
import os
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from pillow_heif import register_heif_opener

from configs.dataset import Dataset, Masks
from configs.errors import UserError
from pipeline.data.pascal_context import write_context_masks
from pipeline.data.scenes import write_scenes

IGNORE = 255
_SPREAD = {"L;2": 85, "L;4": 17}  # Pillow spreads grey values of 2 and 4 bits over 0..255
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".heic", ".heif", ".avif")
register_heif_opener()


class BrokenFile(UserError):
    """An image or mask that is missing, damaged, mis-sized or out of range; `--on-error skip` skips it."""


class SegmentationDataset:
    """One split. Rows are numbered in the order of `ids`.

    Attributes:
        ids: image ids, in the order of the split lists (or sorted, where ids come from file names).
        root: the dataset's folder: DATA_ROOT/<root of its YAML>, or DATA_ROOT itself if that folder does not exist.
        seen_indices: which of all classes are seen, ascending.
        seen_lookup: (256,) uint8, class index -> index among the seen classes, IGNORE for unseen ones.
    """

    def __init__(self, config: Dataset, data_root: Path, split: str) -> None:
        if split not in config.splits:
            raise UserError(f"dataset {config.name} has no split {split!r}; it has {', '.join(config.splits)}")
        self.config = config
        self.split = split
        self._files = config.splits[split]
        if config.generator == "scenes":
            write_scenes(data_root / config.root)
        self.root = self._find_root(data_root)
        if config.generator == "pascal-context":
            write_context_masks(self.root)
        self._scanned: dict[str, dict[str, str]] = {}
        self.ids = self._list_ids()[: config.limit]
        self._class_lookups = {masks.values: _class_lookup(config, masks.values) for masks in self._files.masks}
        self.seen_lookup = np.full(256, IGNORE, np.uint8)
        self.seen_indices = config.seen_indices
        self.seen_lookup[self.seen_indices] = np.arange(len(self.seen_indices))

    @property
    def expected(self) -> int:
        """Expected number of images: the YAML's `count`, or the actual number if it has none."""
        count = self._files.count or len(self.ids)
        return min(count, self.config.limit or count)

    def _find_root(self, data_root: Path) -> Path:
        folder = Path(self._files.images.partition("{id}")[0] + "_").parent
        for root in (data_root / self.config.root, data_root):
            if (root / folder).is_dir():
                return root
        wanted = data_root / self.config.root / folder
        raise UserError(
            f"no folder {wanted} (nor {data_root / folder}): put dataset {self.config.name} there, "
            "or pass its folder as --data-root"
        )

    def _list_ids(self) -> list[str]:
        if not self._files.ids:
            ids = sorted(self._scan(self._files.images))
            source = f"{self.root} holds no file {self._files.images}"
        else:
            ids = []
            for name in self._files.ids:
                listing = self.root / name
                try:
                    ids += [
                        line.strip() for line in listing.read_text(encoding="utf-8-sig").splitlines() if line.strip()
                    ]
                except (OSError, UnicodeDecodeError) as error:
                    reason = getattr(error, "strerror", "it is no UTF-8 text")
                    raise UserError(f"cannot read the split list {listing}: {reason}; write one id per line") from error
            source = f"the split list {self.root / self._files.ids[0]} is empty"
        if not ids:
            raise UserError(f"{source}: check the dataset's files, its YAML and --data-root")
        twice = [name for name, times in Counter(ids).items() if times > 1]
        if twice:
            names = ", ".join(map(repr, twice[:10])) + (f" and {len(twice) - 10} more" if len(twice) > 10 else "")
            raise UserError(f"split {self.split} of {self.root} lists {names} more than once: keep one of each")
        return ids

    def _scan(self, pattern: str) -> dict[str, str]:
        """Image id -> file below the root, of every file that matches the pattern."""
        if pattern in self._scanned:
            return self._scanned[pattern]
        before, after = pattern.split("{id}")
        matching = glob.escape(before) + ("**/*" if before.endswith("/") or not before else "*")
        matching += after if after == ".*" else glob.escape(after)
        found: dict[str, str] = {}
        for path in glob.iglob(matching, root_dir=self.root, recursive=True):  # follows links, leaves out hidden files
            ending = Path(path).suffix if after == ".*" else after
            if after == ".*" and ending.lower() not in _IMAGE_SUFFIXES:
                continue
            image_id = path[len(before) :].removesuffix(ending)
            if image_id in found:
                both = f"{found[image_id]} and {path}"
                raise UserError(f"{self.root}: {both} have the same id: keep one, or put the extension in the pattern")
            found[image_id] = path
        self._scanned[pattern] = found
        return found

    def __len__(self) -> int:
        return len(self.ids)

    def _located(self, pattern: str, row: int) -> str:
        """A str, not a Path: training checks every file at the start, and making a Path takes longer than the check."""
        name = pattern.replace("{id}", self.ids[row])
        found = self._scan(pattern).get(self.ids[row], name) if pattern.endswith(".*") else name
        return os.path.join(self.root, found)

    def image_path(self, row: int) -> Path:
        return Path(self._located(self._files.images, row))

    def mask_path(self, row: int) -> Path:
        return Path(self._mask_file(row)[0])

    def _mask_file(self, row: int) -> tuple[str, int, Masks]:
        """The first of the split's mask patterns that has a file, or the first pattern; and the file's bytes."""
        first: tuple[str, int, Masks] | None = None
        for masks in self._files.masks:
            path = self._located(masks.files, row)
            found = path, _size(path), masks
            if found[1] >= 0:
                return found
            first = first or found
        assert first is not None  # a split has a pattern
        return first

    def image(self, row: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB, upright."""
        path = self.image_path(row)
        with opened(path, "image") as picture:
            mode = picture.mode
            if not mode.startswith(("I", "F")):
                return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
        raise BrokenFile(f"image {path} has mode {mode}: convert it to 8 bits per channel")  # Pillow clips to white

    def mask(self, row: int) -> np.ndarray:
        """(H, W) uint8, class indices of *all* classes, IGNORE where there is none. For evaluation and reports."""
        name, _, masks = self._mask_file(row)
        path = Path(name)
        with opened(path, "mask") as picture:
            mode = picture.mode
            spread = max((_SPREAD.get(tile[3], 1) for tile in getattr(picture, "tile", ())), default=1)
            values = np.asarray(picture)
        if mode not in ("L", "P"):
            raise BrokenFile(f"mask {path} has mode {mode}: masks must be 8-bit, with one class value per pixel")
        values = values // spread
        mask = self._class_lookups[masks.values][values]
        wrong = np.unique(values[mask < 0])
        if len(wrong):
            raise BrokenFile(
                f"mask {path} holds {', '.join(map(str, wrong))}, which is neither a class nor ignored: correct the "
                f"file, or `values` and `ignore_index` of dataset {self.config.name}"
            )
        return mask.astype(np.uint8)

    def pair(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and full mask, checked to have the same size."""
        image, mask = self.image(row), self.mask(row)
        if image.shape[:2] != mask.shape:
            raise BrokenFile(
                f"mask {self.mask_path(row)} is {mask.shape[1]} x {mask.shape[0]} but its image is "
                f"{image.shape[1]} x {image.shape[0]}: both must have the same size"
            )
        return image, mask

    def training_pair(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and seen mask: (H, W) uint8 indices among the seen classes, IGNORE for unseen and unlabelled pixels."""
        image, mask = self.pair(row)
        return image, self.seen_lookup[mask]

    def digest(self) -> str:
        """SHA-256, in hex, of `file_sizes`."""
        return hashlib.sha256(json.dumps(self.file_sizes()).encode()).hexdigest()

    def file_sizes(self) -> list[tuple[str, int, int]]:
        """(id, bytes of the image, bytes of the mask) of every row: a cheap way to detect a changed dataset.

        Missing files have -1 bytes.
        """
        images = self._files.images
        return [(name, _size(self._located(images, row)), self._mask_file(row)[1]) for row, name in enumerate(self.ids)]


def _class_lookup(config: Dataset, values: str | None) -> np.ndarray:
    """(256,) int16: pixel value -> class index, IGNORE, or -1 for an unknown value."""
    lookup = np.full(256, -1, np.int16)
    lookup[list(config.ignore_index)] = IGNORE
    lookup[config.value_of_class(values)] = np.arange(len(config.classes))
    return lookup


def _size(path: str) -> int:
    """Bytes of the file, -1 if there is none."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):  # ValueError, and some OSErrors: an id that can be the name of no file
        return -1


@contextmanager
def opened(path: Path, kind: str) -> Iterator[Image.Image]:
    """Open an image; errors while decoding it inside the block become BrokenFile."""
    try:
        with Image.open(path) as picture:
            yield picture
    except FileNotFoundError as error:
        raise BrokenFile(f"missing {kind} {path}: add it, or list only ids that have one (`ids`)") from error
    except (OSError, SyntaxError, ValueError, RuntimeError, struct.error, Image.DecompressionBombError) as error:
        raise BrokenFile(f"{kind} {path} is truncated or not an image ({error}): replace the file") from error
