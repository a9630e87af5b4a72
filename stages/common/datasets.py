"""Opens datasets on disk and checks them file by file."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from configs.dataset import AnyOf, Dataset
from configs.errors import UserError
from pipeline.data.dataset import BrokenFile, SegmentationDataset, ignore_index
from pipeline.data.masks import Palette
from stages.common.progress import progress_bar, say


def open_split(config: Dataset, data_root: Path, split: str) -> SegmentationDataset:
    """Open a split; warn if it does not have the number of images that the dataset's YAML expects."""
    dataset = SegmentationDataset(config, data_root, split)
    if len(dataset) != dataset.expected:
        say(f"warning: {_miscount(dataset)}; run `datasets check {config.name}` to see what is missing")
    return dataset


def open_training_split(config: Dataset, data_root: Path) -> SegmentationDataset:
    """The split `train`. UserError if its classes cannot be trained on."""
    several = [
        name for name in config.classes if name not in config.unseen and isinstance(config.prompts.get(name), AnyOf)
    ]
    if several:
        raise UserError(
            f"dataset {config.name}: prompts.{several[0]} is {{any: ...}}, but the class is seen: for training, list "
            "its names, which are averaged, or make it unseen"
        )
    dataset = open_split(config, data_root, "train")
    _ = dataset.seen_lookup  # UserError if there are too many classes
    return dataset


def _miscount(dataset: SegmentationDataset) -> str:
    return f"{dataset.root}: split {dataset.split} has {len(dataset)} images, expected {dataset.expected}"


@dataclass
class Check:
    """The result of `check`. Warnings may be intended.

    Attributes:
        pixels, images: (K,) int64 counts of each class.
        good: by split, the ids whose image and mask can be used.
    """

    pixels: np.ndarray
    images: np.ndarray
    good: dict[str, list[str]] = field(default_factory=dict)
    unlabelled: int = 0
    readable: int = 0
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check(config: Dataset, data_root: Path) -> Check:
    """Read every image and mask of every split; each fault is one line that names the file.

    A fault is a missing split list or folder, a duplicate id, a split of unexpected size, an image in two splits, an
    image or mask that is missing, damaged or of the wrong mode, a mask and image of different sizes, or a mask value
    that is neither a class nor ignored. Suspicious pairs and ignored files are warnings, one line for each kind.
    """
    found = Check(np.zeros(len(config.classes), np.int64), np.zeros(len(config.classes), np.int64))
    split_of: dict[Path, str] = {}
    palettes: dict[str | None, Palette] = {}
    for split in config.splits:
        try:
            dataset = SegmentationDataset(config, data_root, split, found.faults)
        except UserError as error:
            found.faults.append(str(error))
            continue
        dataset.palettes = palettes
        if len(dataset) != dataset.expected:
            found.faults.append(_miscount(dataset))
        images = dict.fromkeys(map(dataset.image_path, range(len(dataset))), split)
        shared = sorted(images.keys() & split_of.keys())
        if shared:
            both = f"{split_of[shared[0]]} and {split}"
            found.faults.append(f"splits {both} share {len(shared)} images, {shared[0]} is the first: keep each in one")
        split_of = images | split_of
        ignored = [Path(name) for name in dataset.passed_over]
        doubts = {"files next to the images are ignored, because of their extension or as repeated links": ignored}
        good = found.good[split] = list[str]()
        with progress_bar(f"check {split}", len(dataset), "images") as advance:
            for row, read in enumerate(_read_all(dataset)):
                advance()
                if isinstance(read, str):
                    found.faults.append(read)
                    continue
                good.append(dataset.ids[row])
                counts, doubted = read
                for doubt in doubted:
                    doubts.setdefault(doubt, []).append(dataset.mask_path(row))
                pixels = counts[: len(config.classes)]
                found.readable += 1
                found.pixels += pixels
                found.images += pixels > 0
                found.unlabelled += int(counts[-1])
        if good and not found.pixels.any():
            found.warnings.append(f"split {split}: no mask has a pixel of any class: check `values`")
        found.warnings += [f"split {split}: {len(f)} {doubt}; {f[0]} is the first" for doubt, f in doubts.items() if f]
    return found


def good_lists(config: Dataset, file: Path) -> dict[str, Path]:
    """By split, the file for its good ids: `file`, with the split's name in place of {split}.

    Raises:
        UserError: the splits would share a file, or it is there already.
    """
    files = {split: Path(str(file).replace("{split}", split)) for split in config.splits}
    if len(set(files.values())) < len(files):
        raise UserError(
            f"--fix-list {file}: {config.name} has the splits {', '.join(files)}: put {{split}} into the name, as in "
            "good-{split}.txt"
        )
    for path in files.values():
        if path.exists():
            raise UserError(f"--fix-list: {path} exists already: choose another name, or delete it")
    return files


def _read_all(dataset: SegmentationDataset) -> Iterator[tuple[np.ndarray, list[str]] | str]:
    """For every row, pixel counts of all mask values, and doubts; or the error. Decoding runs in threads."""
    values = ignore_index(len(dataset.config.classes)) + 1

    def read(row: int) -> tuple[np.ndarray, list[str]] | str:
        try:
            return np.bincount(dataset.pair(row)[1].ravel(), minlength=values), dataset.doubts(row)
        except BrokenFile as error:
            return str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(read, range(len(dataset)))
