"""Reads images and masks of one split of any dataset. Errors are one line that names the file.

Masks on disk contain all classes. Unseen classes are hidden here and nowhere else: `training_pair` returns the only
mask that training sees (generalised zero-label: unseen pixels become "ignored").
"""

import hashlib
import json
import os
import re
from collections import Counter
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np

from configs.dataset import Dataset, Masks
from configs.errors import UserError
from pipeline.data.files import BrokenFile as BrokenFile  # part of this module's interface, like IGNORE
from pipeline.data.files import files_in, is_picture, listing, opened, rgb
from pipeline.data.masks import IGNORE as IGNORE
from pipeline.data.masks import MaskReader, Palette, colours, orientation
from pipeline.data.masks import ignore_index as ignore_index
from pipeline.data.pascal_context import write_context_masks
from pipeline.data.scenes import write_scenes


class SegmentationDataset:
    """One split. Rows are numbered in the order of `ids`.

    Attributes:
        ids: image ids, in the order of the split lists (or sorted, where ids come from file names).
        root: the dataset's folder: DATA_ROOT/<root of its YAML>, or DATA_ROOT itself if that folder does not exist.
        passed_over: ignored files, if ids come from file names: repeated links, and other formats for a final `.*`.
        palettes: for each coding of masks, the palette that others are compared with, once it is known.
        seen_indices: which of all classes are seen, ascending.
    """

    def __init__(self, config: Dataset, data_root: Path, split: str, faults: list[str] | None = None) -> None:
        """`faults` gets a line if the split list repeats ids, each of which then counts once; by default an error."""
        if split not in config.splits:
            cure = ": it is for `evaluate` only" if split == "train" else ""
            raise UserError(f"dataset {config.name} has no split {split!r}; it has {', '.join(config.splits)}{cure}")
        self.config = config
        self.split = split
        self._files = config.splits[split]
        if config.generator == "scenes":
            write_scenes(data_root / config.root)
        self.root = self._find_root(data_root)
        if config.generator == "pascal-context":
            write_context_masks(self.root)
        self._folders: dict[str, dict[str, list[str]]] = {}
        self.passed_over: list[str] = []
        self.ids = self._list_ids(faults)[: config.limit]
        self._readers = {masks.values: MaskReader(config, masks.values) for masks in self._files.masks}
        self.palettes: dict[str | None, Palette] = {}
        self.seen_indices = config.seen_indices

    @cached_property
    def seen_lookup(self) -> np.ndarray:
        """(256,) uint8, class index -> index among the seen classes, IGNORE for unseen ones.

        Raises:
            UserError: there are more classes than 8-bit masks hold.
        """
        if len(self.config.classes) > IGNORE:
            raise UserError(
                f"dataset {self.config.name} has {len(self.config.classes)} classes: training takes at most {IGNORE}; "
                "more can be evaluated"
            )
        lookup = np.full(256, IGNORE, np.uint8)
        lookup[self.seen_indices] = np.arange(len(self.seen_indices))
        return lookup

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

    def _list_ids(self, faults: list[str] | None) -> list[str]:
        if not self._files.ids:
            ids = self._scan()
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
            fault = f"split {self.split} of {self.root} lists {names} more than once: keep one of each"
            if faults is None:
                raise UserError(fault)
            faults.append(fault)
        return list(dict.fromkeys(ids))

    def _scan(self) -> list[str]:
        """The ids of all files that match the pattern of images, sorted."""
        before, after = os.path.join(self.root, self._files.images).split("{id}")
        found, again = set[str](), list[str]()
        for path in files_in(os.path.dirname(before), before.endswith("/"), again, after):
            ending = os.path.splitext(path)[1] if after == ".*" else after
            image_id = path[len(before) :].removesuffix(ending)
            if path.startswith(before) and path.endswith(ending) and image_id:
                known = after != ".*" or is_picture(path)
                found.add(image_id) if known else again.append(path)
        self.passed_over = sorted(path for path in again if path.startswith(before))
        return sorted(found)

    def __len__(self) -> int:
        return len(self.ids)

    def _candidates(self, pattern: str, image_id: str) -> list[str]:
        """The paths that an id can have: that of the pattern, or for a final `.*` the images with this name."""
        path = os.path.join(self.root, pattern.replace("{id}", image_id))
        if not pattern.endswith(".*"):
            return [path]
        folder, name = os.path.split(path.removesuffix(".*"))
        if folder not in self._folders:
            by_name: dict[str, list[str]] = {}
            for file in listing(folder):
                if is_picture(file):
                    by_name.setdefault(os.path.splitext(file)[0], []).append(os.path.join(folder, file))
            self._folders[folder] = by_name  # threads read at the same time
        return self._folders[folder].get(name, [path])

    def _located(self, pattern: str, row: int) -> str:
        """A str, not a Path: training checks every file at the start, and making a Path takes longer than the check."""
        return self._candidates(pattern, self.ids[row])[0]

    def _the_file(self, kind: str, pattern: str, row: int) -> Path:
        """The file of a row. BrokenFile, with the remedy, if there is none or there are several."""
        image_id = self.ids[row]
        files = self._candidates(pattern, image_id)
        if len(files) > 1 and len(set(map(os.path.realpath, files))) > 1:
            raise BrokenFile(f"{' and '.join(files)} have the same id: keep one, or put the extension in the pattern")
        if not os.path.exists(files[0]):
            cure = "add it, or list only ids that have one (`ids`)"
            words = map(Path, re.split(r"[\s,;]+", image_id.replace("\\", "/")))  # the line may hold file names
            guesses = (str(guess) for word in words for guess in (word, word.with_suffix(""), word.name, word.stem))
            if meant := next((g for g in guesses if g and os.path.lexists(self._candidates(pattern, g)[0])), None):
                cure = f"the split list says {image_id!r}, but the id is {meant!r} ({{id}} in {pattern})"
            raise BrokenFile(f"missing {kind} {files[0]}: {cure}")
        return Path(files[0])

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
        """(H, W, 3) uint8 RGB, converted by `pipeline.data.files.rgb`."""
        path = self._the_file("image", self._files.images, row)
        with opened(path, "image") as picture:
            return rgb(picture, f"image {path}")

    def mask(self, row: int) -> np.ndarray:
        """(H, W), indices of *all* classes, `ignore_index` where there is none. For evaluation and reports."""
        masks = self._mask_file(row)[2]
        path = self._the_file("mask", masks.files, row)
        return self._readers[masks.values](path, lambda: self._first_palette(masks.values))

    def _first_palette(self, values: str | None) -> Palette:
        """Of the first palette mask among those coded by `values`; there must be one."""
        for name, _, masks in map(self._mask_file, range(len(self))):
            if values in self.palettes:
                break
            with suppress(BrokenFile), opened(path := Path(name), "mask") as picture:
                if masks.values == values and picture.mode == "P":
                    self.palettes[values] = path, colours(picture)
        return self.palettes[values]

    def doubts(self, row: int) -> list[str]:
        """What looks like a mistake in a readable pair, but may be intended; the same text for all pairs."""
        path, _, masks = self._mask_file(row)
        found = []
        with opened(self.image_path(row), "image") as image, opened(Path(path), "mask") as mask:
            tags = orientation(image), orientation(mask)
            # Sizes show a mismatch, except for square images, and if both tags or neither swap the sides.
            if tags[0] != tags[1] and (image.width == image.height or (tags[0] > 4) == (tags[1] > 4)):
                found.append("masks have a different orientation tag from their images: check that they match")
            if self._readers[masks.values].clash(Path(path), mask, lambda: self._first_palette(masks.values)):
                found.append("masks have a different palette from the first: classes are indices, not colours")
        return found

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


def _size(path: str) -> int:
    """Bytes of the file, -1 if there is none."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):  # ValueError, and some OSErrors: an id that can be the name of no file
        return -1
