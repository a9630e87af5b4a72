"""Reads images and masks of one split of any dataset, and says in one line what is wrong with a file.

Masks on disk hold all classes. Hiding the unseen ones is done here and nowhere else: `training_pair` gives the only
mask that training gets to see (generalised zero-label: unseen pixels become "ignored").
"""

import hashlib
import json
import os
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np

from configs.dataset import Dataset, Masks, Values
from configs.errors import UserError
from pipeline.data.files import BrokenFile, files_in, is_picture, opened, rgb
from pipeline.data.masks import IGNORE as IGNORE  # where others look for it
from pipeline.data.masks import MaskReader, Palette, orientation, palette_of
from pipeline.data.pascal_context import write_context_masks
from pipeline.data.scenes import write_scenes


class SegmentationDataset:
    """One split. Rows are numbered in the order of `ids`.

    Attributes:
        ids: image ids, in the order of the split lists (or sorted, where ids come from file names).
        root: the dataset's folder: DATA_ROOT/<root of its YAML>, or DATA_ROOT itself where there is no such folder.
        passed_over: where ids come from file names, the files beside them that are none: links to files that are there
            already, and for a pattern with a final `.*` whatever has no image's ending.
        palettes: by the coding of masks, the palette that others are compared with, as soon as it is known.
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
        self._scanned: dict[str, dict[str, list[str]]] = {}
        self.passed_over: list[str] = []
        self.ids = self._list_ids()[: config.limit]
        self._readers = {masks.values: MaskReader(config, masks.values) for masks in self._files.masks}
        self.palettes: dict[Values | None, Palette] = {}
        self.seen_lookup = np.full(256, IGNORE, np.uint8)
        self.seen_indices = config.seen_indices
        self.seen_lookup[self.seen_indices] = np.arange(len(self.seen_indices))

    @property
    def expected(self) -> int:
        """How many images the split should have: the YAML's `count`, or what there is."""
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
            "or name its folder by --data-root"
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
                    raise UserError(f"cannot read the split list {listing}: {reason}; write one id a line") from error
            source = f"the split list {self.root / self._files.ids[0]} is empty"
        if not ids:
            raise UserError(f"{source}: check the dataset's files, its YAML and --data-root")
        twice = [name for name, times in Counter(ids).items() if times > 1]
        if twice:
            names = ", ".join(map(repr, twice[:10])) + (f" and {len(twice) - 10} more" if len(twice) > 10 else "")
            raise UserError(f"split {self.split} of {self.root} lists {names} more than once: keep one of each")
        return ids

    def _scan(self, pattern: str) -> dict[str, list[str]]:
        """Image id -> its files, of every file that matches the pattern; several only for a final `.*`."""
        if pattern in self._scanned:
            return self._scanned[pattern]
        before, after = pattern.split("{id}")
        before = os.path.join(self.root, before)
        found: dict[str, list[str]] = {}
        again: list[str] = []
        for path in files_in(os.path.dirname(before), before.endswith("/"), again, after):
            ending = os.path.splitext(path)[1] if after == ".*" else after
            image_id = path[len(before) :].removesuffix(ending)
            if not path.startswith(before) or not path.endswith(ending) or not image_id:
                continue
            if after == ".*" and not is_picture(path):
                again.append(path)
            else:
                found.setdefault(image_id, []).append(path)
        if pattern == self._files.images and not self._files.ids:
            self.passed_over = sorted(again)
        self._scanned[pattern] = found
        return found

    def __len__(self) -> int:
        return len(self.ids)

    def _located(self, pattern: str, row: int) -> str:
        """Text, not a Path: training looks at every file as it starts, and a Path takes longer than a look at one."""
        found = self._scan(pattern).get(self.ids[row]) if pattern.endswith(".*") else None
        return found[0] if found else os.path.join(self.root, pattern.replace("{id}", self.ids[row]))

    def _the_file(self, kind: str, pattern: str, row: int) -> Path:
        """BrokenFile, which says what to do, if there is none or there are several."""
        path, image_id = self._located(pattern, row), self.ids[row]
        if pattern.endswith(".*") and len(files := self._scan(pattern).get(image_id, [])) > 1:
            raise BrokenFile(f"{' and '.join(files)} have one id: keep one, or write the ending in the pattern")
        if not os.path.lexists(path):
            cure = "add it, or list only ids that have one (`ids`)"
            words = map(Path, re.split(r"[\s,;]+", image_id.replace("\\", "/")))  # a list of file names, say
            guesses = (str(guess) for word in words for guess in (word, word.with_suffix(""), word.name, word.stem))
            if meant := next((guess for guess in guesses if guess in self._scan(pattern)), None):
                cure = f"the split list says {image_id!r} where {meant!r} is an id ({{id}} in {pattern})"
            raise BrokenFile(f"missing {kind} {path}: {cure}")
        return Path(path)

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
        """(H, W, 3) uint8 RGB, as `pipeline.data.files.rgb` has it."""
        path = self._the_file("image", self._files.images, row)
        with opened(path, "image") as picture:
            return rgb(picture, f"image {path}")

    def mask(self, row: int) -> np.ndarray:
        """(H, W) uint8, class indices of *all* classes, IGNORE where there is none. For evaluation and reports."""
        masks = self._mask_file(row)[2]
        path = self._the_file("mask", masks.files, row)
        return self._readers[masks.values](path, lambda: self._first_palette(masks.values))

    def _first_palette(self, values: Values | None) -> Palette:
        """That of the first mask with one, of those that are coded by `values`; one must have it."""
        for row in range(len(self)):
            if values in self.palettes:
                break
            path, _, masks = self._mask_file(row)
            with suppress(BrokenFile):
                if masks.values == values and (palette := palette_of(Path(path))) is not None:
                    self.palettes[values] = Path(path), palette
        return self.palettes[values]

    def doubts(self, row: int) -> list[str]:
        """What may be meant, but looks like a mistake, in a pair that can be read; the same words for all pairs."""
        path, _, masks = self._mask_file(row)
        found = []
        with opened(self.image_path(row), "image") as image, opened(Path(path), "mask") as mask:
            tags = orientation(image), orientation(mask)
            # The size says whether they fit, but of square images, and where neither tag or both swap the sides.
            if tags[0] != tags[1] and (image.width == image.height or (tags[0] > 4) == (tags[1] > 4)):
                found.append("images and masks have different orientation tags: see whether they fit as they are shown")
            if self._readers[masks.values].clash(Path(path), mask, lambda: self._first_palette(masks.values)):
                found.append("masks have another palette than the first: their indices, not colours, are the classes")
        return found

    def pair(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and full mask, checked to be of one size."""
        image, mask = self.image(row), self.mask(row)
        if image.shape[:2] != mask.shape:
            raise BrokenFile(
                f"mask {self.mask_path(row)} is {mask.shape[1]} x {mask.shape[0]} but its image is "
                f"{image.shape[1]} x {image.shape[0]}: both must have one size"
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
        """(id, bytes of the image, bytes of the mask) of every row: tells two versions of a dataset apart cheaply.

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
