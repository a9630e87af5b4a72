"""Reads images and masks of one split of any dataset, and says in one line what is wrong with a file.

Masks on disk hold all classes. Hiding the unseen ones is done here and nowhere else: `seen_mask` is the only mask
that training gets to see.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from configs.errors import UserError
from configs.schema import Dataset
from pipeline.data.scenes import write_scenes

IGNORE = 255


class SegmentationDataset:
    """One split. Rows are numbered in the order of `ids`.

    Attributes:
        ids: image ids, in the order of the split list (or sorted, where ids come from file names).
        seen_lookup: (256,) uint8, class index -> index among the seen classes, IGNORE for unseen ones.
    """

    def __init__(self, config: Dataset, data_root: Path, split: str) -> None:
        if split not in config.splits:
            raise UserError(f"dataset {config.name} has no split {split!r}; it has {', '.join(config.splits)}")
        self.config = config
        self.split = split
        self.root = data_root / config.root
        if config.generator == "scenes":
            write_scenes(self.root)
        if not self.root.is_dir():
            raise UserError(f"no folder {self.root}: put dataset {config.name} there or name its parent by --data-root")
        self._files = config.splits[split]
        self.ids = self._list_ids()
        expected = self._files.count
        if expected is not None and len(self.ids) != expected:
            raise UserError(
                f"{self.root}: split {split} has {len(self.ids)} images, {expected} are expected; "
                f"complete the files or correct `count` in the dataset's YAML"
            )
        self.seen_lookup = np.full(256, IGNORE, np.uint8)
        self.seen_lookup[config.seen_indices] = np.arange(len(config.seen_indices))

    def _list_ids(self) -> list[str]:
        if self._files.ids is None:
            before, after = self._files.images.split("{id}")
            pattern = self._files.images.replace("{id}", "*")
            paths = sorted(path.relative_to(self.root).as_posix() for path in self.root.glob(pattern))
            ids = [path[len(before) : len(path) - len(after)] for path in paths]
            source = f"{self.root / pattern} matches no file"
        else:
            listing = self.root / self._files.ids
            try:
                ids = listing.read_text().split()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"cannot read the split list {listing}: {error}; write one id a line") from error
            source = f"the split list {listing} is empty"
        if not ids:
            raise UserError(f"{source}: check the dataset's files and its YAML")
        return ids

    def __len__(self) -> int:
        return len(self.ids)

    def image_path(self, row: int) -> Path:
        return self.root / self._files.images.format(id=self.ids[row])

    def mask_path(self, row: int) -> Path:
        return self.root / self._files.masks.format(id=self.ids[row])

    def image(self, row: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB, upright."""
        path = self.image_path(row)
        picture = _open(path, "image")
        if picture.mode.startswith(("I", "F")):  # Pillow would clip them to white
            raise UserError(f"image {path} has mode {picture.mode}: convert it to 8 bits a channel")
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))

    def mask(self, row: int) -> np.ndarray:
        """(H, W) uint8, class indices of *all* classes, IGNORE where there is none. For evaluation and reports."""
        path = self.mask_path(row)
        picture = _open(path, "mask")
        if picture.mode not in ("L", "P"):
            raise UserError(f"mask {path} has mode {picture.mode}: masks must be 8-bit, one class index a pixel")
        mask = np.array(picture)
        mask[mask == self.config.ignore_index] = IGNORE
        count = len(self.config.classes)
        wrong = (mask >= count) & (mask != IGNORE)
        if wrong.any():
            raise UserError(
                f"mask {path} holds the value {mask[wrong][0]}: only 0..{count - 1} and {self.config.ignore_index} are "
                f"classes of {self.config.name}; correct the file or the dataset's YAML"
            )
        return mask

    def pair(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and full mask, checked to be of one size."""
        image, mask = self.image(row), self.mask(row)
        if image.shape[:2] != mask.shape:
            raise UserError(
                f"mask {self.mask_path(row)} is {mask.shape[1]} x {mask.shape[0]} but its image is "
                f"{image.shape[1]} x {image.shape[0]}: both must have one size"
            )
        return image, mask

    def training_pair(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and seen mask: (H, W) uint8 indices among the seen classes, IGNORE for unseen and unlabelled pixels."""
        image, mask = self.pair(row)
        return image, self.seen_lookup[mask]

    def file_sizes(self) -> list[tuple[str, int, int]]:
        """(id, bytes of the image, bytes of the mask) of every row: tells two versions of a dataset apart cheaply."""
        return [(name, _size(self.image_path(row)), _size(self.mask_path(row))) for row, name in enumerate(self.ids)]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"missing file {path}: {error.strerror}; complete the dataset or its split list") from error


def _open(path: Path, kind: str) -> Image.Image:
    try:
        picture = Image.open(path)
        picture.load()
    except FileNotFoundError as error:
        raise UserError(f"missing {kind} {path}: complete the dataset or its split list") from error
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{kind} {path} is truncated or not an image ({error}): replace the file") from error
    return picture
