"""The five datasets as they are on disk: small trees in the official layouts, and real files.

What a pixel means is written down here once more, from the datasets' own descriptions.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.dataset import Dataset
from configs.load import dataset_settings
from configs.schema import CONFIGS
from pipeline.data.dataset import SegmentationDataset
from pipeline.data.files import BrokenFile
from pipeline.data.pascal_context import CATEGORIES
from tests.reference import NONE, Array

SHARED = CONFIGS.parent.parent / "shared" / "data"
COCO, ADE, NAMES = SHARED / "cocostuff_spade_sample", SHARED / "ade20k_sample", SHARED / "class_names"
needs_samples = pytest.mark.skipif(not (COCO.is_dir() and ADE.is_dir()), reason=f"no real files: {SHARED} is absent")

# Pixel value -> class index; None: no class. Any other value is an error.
Coding = dict[int, int | None]
NOT_IN_COCO = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
EVALUATED = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]  # of Cityscapes
CODINGS: dict[str, Coding] = {
    "coco-stuff": {v: i for i, v in enumerate(v for v in range(182) if v not in NOT_IN_COCO)} | {255: None},
    "coco-stuff converted": {value: value for value in range(171)} | {255: None},
    "pascal-voc": {0: None, 255: None} | {value: value - 1 for value in range(1, 21)},
    "pascal-context": {0: None} | {value: value - 1 for value in range(1, 60)},
    "pascal-voc-21": {255: None} | {value: value for value in range(21)},
    "pascal-context-60": {255: None} | {value: value for value in range(60)},
    "ade20k": {0: None} | {value: value - 1 for value in range(1, 151)},
    "cityscapes": {v: EVALUATED.index(v) if v in EVALUATED else None for v in [*range(34), 255]},
    "cityscapes converted": {value: value for value in range(19)} | {255: None},
}


def meant(values: Array, coding: Coding) -> Array:
    """The class of every pixel, one value at a time."""
    classes = np.full(values.shape, 77, np.uint8)
    for value in np.unique(values):
        index = coding[int(value)]
        classes[values == value] = NONE if index is None else index
    return classes


@dataclass
class Layout:
    """A dataset on disk below `data_root`, written file by file."""

    name: str
    data_root: Path
    rng: np.random.Generator
    expected: dict[str, tuple[tuple[int, ...], Array]] = field(default_factory=dict)  # id -> colour, mask

    def __post_init__(self) -> None:
        self.settings = dataset_settings(self.name)
        self.root = self.data_root / self.settings.get("root", self.name)

    def image(self, path: str, image_id: str) -> None:
        """In one colour, which tells images apart even as JPEG."""
        colour = tuple(self.rng.integers(0, 256, 3).tolist())
        size = self.rng.integers(2, 30, 2)
        self.expected[image_id] = colour, np.full(size, 77, np.uint8)
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (int(size[1]), int(size[0])), colour).save(file, quality=100)

    def mask(self, path: str, image_id: str, coding: Coding, palette: bool = False, read: bool = True) -> None:
        """Random values of the coding; unless `read` is False, their meaning is what the dataset should say."""
        values = self.rng.choice([*coding], self.expected[image_id][1].shape).astype(np.uint8)
        self.values(path, values, palette)
        if read:
            self.expected[image_id] = self.expected[image_id][0], meant(values, coding)

    def values(self, path: str, values: Array, palette: bool = False) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(values)
        if palette:
            picture.putpalette(self.rng.integers(0, 256, 768).astype(np.uint8).tobytes())
        picture.save(file)

    def lines(self, path: str, ids: Iterable[str]) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{image_id}\n" for image_id in ids))

    def read(self, split: str, data_root: Path | None = None) -> SegmentationDataset:
        return SegmentationDataset(Dataset.model_validate(self.settings), data_root or self.data_root, split)

    def check(self, split: str, ids: list[str]) -> None:
        """Ids in this order, and every pixel; by the folder above and by the folder itself."""
        for data_root in (self.data_root, self.root):
            dataset = self.read(split, data_root)
            assert dataset.ids == ids and len(dataset) == len(ids) and dataset.root == self.root
            assert dataset.expected == self.settings["splits"][split]["count"] > len(ids)
            for row, image_id in enumerate(ids):
                colour, mask = self.expected[image_id]
                image, found = dataset.pair(row)
                np.testing.assert_array_equal(found, mask, strict=True)
                np.testing.assert_array_equal(dataset.mask(row), mask, strict=True)
                assert image.shape == (*mask.shape, 3) and np.abs(image.astype(int) - colour).max() <= 4
                self.check_seen(dataset, row, mask)

    def check_seen(self, dataset: SegmentationDataset, row: int, mask: Array) -> None:
        config = dataset.config
        seen = [name for name in config.classes if name not in config.unseen]
        among_seen: Coding = {NONE: None}
        for index, name in enumerate(config.classes):
            among_seen[index] = seen.index(name) if name in seen else None
        np.testing.assert_array_equal(dataset.training_pair(row)[1], meant(mask, among_seen), strict=True)


@pytest.fixture(params=range(3))
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(request.param)


def coco_stuff(data_root: Path, rng: np.random.Generator, codings: list[str]) -> Layout:
    """Two images of val and three of train, with masks in each of the codings, the first of which counts."""
    layout = Layout("coco-stuff", data_root, rng)
    for split, ids in (("train2017", ["000000000009", "000000581929", "000000000030"]), ("val2017", ["7", "000001"])):
        for image_id in ids:
            layout.image(f"images/{split}/{image_id}.jpg", image_id)
            for coding in codings:
                ending = "_labelTrainIds.png" if "converted" in coding else ".png"
                layout.mask(
                    f"annotations/{split}/{image_id}{ending}", image_id, CODINGS[coding], read=coding == codings[0]
                )
    return layout


@pytest.mark.parametrize("codings", [[0], [1], [0, 1]])
def test_coco_stuff(codings: list[int], tmp_path: Path, rng: np.random.Generator) -> None:
    layout = coco_stuff(tmp_path, rng, [["coco-stuff", "coco-stuff converted"][index] for index in codings])
    layout.check("train", ["000000000009", "000000000030", "000000581929"])
    layout.check("val", ["000001", "7"])


def test_both_codings_of_coco_stuff_are_one_mask(tmp_path: Path) -> None:
    """Every class once, and none; some images converted, some not."""
    layout = coco_stuff(tmp_path, np.random.default_rng(0), [])
    raw = np.array([[v for v in range(182) if v not in NOT_IN_COCO] + [255]], np.uint8)
    converted = np.array([[*range(171), 255]], np.uint8)
    layout.values("annotations/train2017/000000000009.png", raw)
    layout.values("annotations/train2017/000000000030_labelTrainIds.png", converted)
    masks = [layout.read("train").mask(row) for row in (0, 1)]
    np.testing.assert_array_equal(masks[0], masks[1], strict=True)
    np.testing.assert_array_equal(masks[0], converted, strict=True)


@pytest.mark.parametrize("name", ["pascal-voc", "pascal-voc-21"])
def test_pascal_voc(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """VOC's own masks go before those of SBD, which hold other values; both are palette images."""
    layout, coding = Layout(name, tmp_path, rng), CODINGS[name]
    lists = {"train": ["2008_02", "2007_33"], "aug": ["2011_01", "2008_01", "2009_05"], "val": ["2007_99", "2007_10"]}
    for part, ids in lists.items():
        layout.lines(f"ImageSets/Segmentation/{part}.txt", ids)
        for image_id in ids:
            layout.image(f"JPEGImages/{image_id}.jpg", image_id)
            if part != "aug":
                layout.mask(f"SegmentationClass/{image_id}.png", image_id, coding, palette=True)
            if part != "val":
                aug = f"SegmentationClassAug/{image_id}.png"
                layout.mask(aug, image_id, coding, read=part == "aug")
    layout.image("JPEGImages/2012_unlisted.jpg", "2012_unlisted")
    layout.check("train", [*lists["train"], *lists["aug"]])
    layout.check("val", lists["val"])


@pytest.mark.parametrize("name", ["pascal-context", "pascal-context-60"])
def test_pascal_context(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    layout = Layout(name, tmp_path, rng)
    lists = {"train": ["2008_000002", "2010_1", "2008_000001"], "val": ["2009_2", "2008_5"]}
    for part, ids in lists.items():
        layout.lines(f"ImageSets/SegmentationContext/{part}.txt", ids)
        for image_id in ids:
            layout.image(f"JPEGImages/{image_id}.jpg", image_id)
            layout.mask(f"SegmentationClassContext/{image_id}.png", image_id, CODINGS[name])
    layout.image("JPEGImages/2010_unlisted.jpg", "2010_unlisted")
    for part, ids in lists.items():
        layout.check(part, ids)


def test_pascal_context_masks_are_painted_in_the_order_of_the_classes() -> None:
    assert list(CATEGORIES.values()) == dataset_settings("pascal-context")["classes"]


def test_ade20k(tmp_path: Path, rng: np.random.Generator) -> None:
    layout = Layout("ade20k", tmp_path, rng)
    splits = {"training": ["ADE_train_00000002", "ADE_train_00000001"], "validation": ["ADE_val_00000001"]}
    for folder, ids in splits.items():
        for image_id in ids:
            layout.image(f"images/{folder}/{image_id}.jpg", image_id)
            layout.mask(f"annotations/{folder}/{image_id}.png", image_id, CODINGS["ade20k"])
    layout.check("train", sorted(splits["training"]))
    layout.check("val", splits["validation"])


@pytest.mark.parametrize("codings", [["cityscapes"], ["cityscapes converted"], ["cityscapes", "cityscapes converted"]])
def test_cityscapes(codings: list[str], tmp_path: Path, rng: np.random.Generator) -> None:
    """Ids hold the city; its folders hold other files too."""
    layout = Layout("cityscapes", tmp_path, rng)
    splits = {
        "train": ["ulm/ulm_000000_000019", "aachen/aachen_000001_000019", "aachen/aachen_000000_000019"],
        "val": ["munster/munster_000000_000019", "frankfurt/frankfurt_000000_000294"],
    }
    for split, ids in splits.items():
        for image_id in ids:
            layout.image(f"leftImg8bit/{split}/{image_id}_leftImg8bit.png", image_id)
            for coding in codings:
                ending = "labelTrainIds" if "converted" in coding else "labelIds"
                path = f"gtFine/{split}/{image_id}_gtFine_{ending}.png"
                layout.mask(path, image_id, CODINGS[coding], read=coding == codings[0])
            layout.values(f"gtFine/{split}/{image_id}_gtFine_instanceIds.png", np.zeros((2, 2), np.uint8))
            layout.lines(f"gtFine/{split}/{image_id}_gtFine_polygons.json", ["{}"])
    for split, ids in splits.items():
        layout.check(split, sorted(ids))


# Where one more image and its mask go, and values that no class has; the first of `wrong` is named.
PLACES: dict[str, tuple[str, str, str | None, list[int]]] = {
    "coco-stuff": ("images/val2017/{}.jpg", "annotations/val2017/{}.png", None, [*sorted(NOT_IN_COCO), 182, 254]),
    "pascal-voc": ("JPEGImages/{}.jpg", "SegmentationClass/{}.png", "ImageSets/Segmentation/val.txt", [21, 254]),
    "pascal-context": (
        "JPEGImages/{}.jpg", "SegmentationClassContext/{}.png", "ImageSets/SegmentationContext/val.txt", [60, 255],
    ),
    "ade20k": ("images/validation/{}.jpg", "annotations/validation/{}.png", None, [151, 255]),
    "cityscapes": ("leftImg8bit/val/{}_leftImg8bit.png", "gtFine/val/{}_gtFine_labelIds.png", None, [34, 254]),
}  # fmt: skip


def one_image(name: str, data_root: Path) -> Layout:
    images, masks, ids, _ = PLACES[name]
    layout = Layout(name, data_root, np.random.default_rng(0))
    layout.image(images.format("x/one"), "x/one")
    layout.mask(masks.format("x/one"), "x/one", CODINGS[name])
    if ids:
        layout.lines(ids, ["x/one"])
    return layout


@pytest.mark.parametrize("name", PLACES)
def test_values_of_no_class(name: str, tmp_path: Path) -> None:
    layout = one_image(name, tmp_path)
    layout.check("val", ["x/one"])
    for value in PLACES[name][3]:
        values = np.full((3, 4), next(iter(CODINGS[name])), np.uint8)
        values[2, 3] = value
        layout.values(PLACES[name][1].format("x/one"), values)
        with pytest.raises(BrokenFile, match=f"holds {value}, which is neither a class nor ignored") as error:
            layout.read("val").mask(0)
        assert str(layout.root / PLACES[name][1].format("x/one")) in str(error.value)


@pytest.mark.parametrize("name", PLACES)
def test_a_mask_that_is_missing(name: str, tmp_path: Path) -> None:
    """The official file is asked for."""
    layout = one_image(name, tmp_path)
    mask = layout.root / PLACES[name][1].format("x/one")
    mask.unlink()
    with pytest.raises(BrokenFile, match="missing mask") as error:
        layout.read("val").mask(0)
    assert str(mask) in str(error.value)


# Real files.


def official_coco() -> dict[int, str]:
    lines = (NAMES / "cocostuff_labels_182_official.txt").read_text().splitlines()
    return {int(number) - 1: name.strip() for number, name in (line.split(":") for line in lines if ":" in line)}


def official_ade() -> dict[int, list[str]]:
    lines = [line.split("\t") for line in (NAMES / "ade20k_objectInfo150.txt").read_text().splitlines()[1:]]
    return {int(line[0]): [name.strip() for name in line[-1].split(",")] for line in lines}


def real(name: str, root: Path, split: str) -> SegmentationDataset:
    return SegmentationDataset(Dataset.model_validate(dataset_settings(name)), root, split)


def check_pixels(dataset: SegmentationDataset, masks: Path, is_class: Callable[[int, str], bool], no_class: int) -> int:
    """Every pixel of every mask: `is_class`(value on disk, name of the class that was read). -> how many values."""
    assert dataset.ids == sorted(path.stem for path in masks.iterdir())
    distinct = set()
    for row, image_id in enumerate(dataset.ids):
        values = np.asarray(Image.open(masks / f"{image_id}.png"))
        image, mask = dataset.pair(row)
        assert image.shape == (*values.shape, 3) and image.std() > 5
        for value in np.unique(values).tolist():
            found = np.unique(mask[values == value]).tolist()
            assert len(found) == 1
            if value == no_class:
                assert found == [NONE]
            else:
                assert is_class(value, dataset.config.classes[found[0]])
                distinct.add(value)
    return len(distinct)


@needs_samples
@pytest.mark.parametrize(("split", "images"), [("train", 13), ("val", 8)])
def test_real_coco_stuff(split: str, images: int) -> None:
    name_of = official_coco()
    dataset = real("coco-stuff", COCO, split)
    assert len(dataset) == images
    masks = COCO / "annotations" / f"{split}2017"
    assert check_pixels(dataset, masks, lambda value, name: name_of[value] == name, 255) > 30


@needs_samples
@pytest.mark.parametrize(("split", "folder", "images"), [("train", "training", 7), ("val", "validation", 9)])
def test_real_ade20k(split: str, folder: str, images: int) -> None:
    """Class 0 is value 1."""
    names_of = official_ade()
    dataset = real("ade20k", ADE, split)
    assert len(dataset) == images

    def is_class(value: int, name: str) -> bool:
        return name in names_of[value] and dataset.config.classes[value - 1] == name

    assert check_pixels(dataset, ADE / "annotations" / folder, is_class, 0) > 20


@needs_samples
def test_training_sees_no_unseen_class_of_real_files() -> None:
    """Grass is in the sample, and hidden."""
    dataset = real("coco-stuff", COCO, "train")
    grass, hidden = dataset.config.classes.index("grass"), 0
    for row in range(len(dataset)):
        full, seen = dataset.mask(row), dataset.training_pair(row)[1]
        unseen = np.isin(full, dataset.config.unseen_indices)
        assert (seen[unseen] == NONE).all() and (seen[~unseen & (full != NONE)] < 156).all()
        hidden += int((full == grass).sum())
    assert hidden > 1000
