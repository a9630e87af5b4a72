"""More than 255 classes: masks of 16 bits, the public layouts that hold them, and what takes 8 bits alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from configs.dataset import Dataset
from configs.errors import UserError
from configs.load import dataset_settings
from pipeline.data.dataset import SegmentationDataset
from pipeline.data.files import BrokenFile
from stages.common.datasets import check, open_training_split
from tests.pipeline.data.trees import Tree
from tests.reference import Array

NONE = 65535
FEW = ("sky", "cat", "tree")


def many(count: int) -> tuple[str, ...]:
    return tuple(f"c{index}" for index in range(count))


def draw(rng: np.random.Generator, classes: int, shape: tuple[int, int] = (9, 14), none: float = 0.2) -> Array:
    truth = np.where(rng.random(shape) < none, NONE, rng.integers(0, classes, shape)).astype(np.uint16)
    truth[0, :3] = 0, classes - 1, NONE
    return truth


def big_endian(path: Path, values: Array) -> None:
    """A TIFF as MATLAB writes it; Pillow writes little-endian ones."""
    height, width = values.shape
    content = values.astype(">u2").tobytes()
    tags = {256: width, 257: height, 258: 16, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(content)}
    table = b"".join(tag.to_bytes(2) + b"\0\4\0\0\0\1" + value.to_bytes(4) for tag, value in tags.items())
    path.write_bytes(b"MM\0*" + (8 + len(content)).to_bytes(4) + content + len(tags).to_bytes(2) + table + bytes(4))


@pytest.mark.parametrize("classes", [256, 300, 847, 65535])
@pytest.mark.parametrize("kind", ["png", "tif", "lzw", "big-endian"])
def test_masks_of_16_bits(kind: str, classes: int, tree: Tree) -> None:
    truth = draw(np.random.default_rng(classes), classes)
    path = tree.root / "masks" / ("a.png" if kind == "png" else "a.tif")
    Image.new("RGB", (14, 9)).save(tree.image_path("a"))
    if kind == "big-endian":
        big_endian(path, truth)
    else:
        Image.fromarray(truth).save(path, **({"compression": "tiff_lzw"} if kind == "lzw" else {}))
    dataset = tree.read({"masks": "masks/{id}.*"}, classes=many(classes), unseen=())
    np.testing.assert_array_equal(dataset.mask(0), truth, strict=True)
    np.testing.assert_array_equal(dataset.pair(0)[1], truth, strict=True)


@pytest.mark.parametrize("classes", [3, 255])
def test_16_bit_files_of_few_classes_are_8_bit_masks(classes: int, tree: Tree) -> None:
    """Values above 255 too."""
    truth = draw(np.random.default_rng(0), classes)
    stored = np.where(truth == NONE, 7, truth + np.uint16(300))
    tree.add("a", np.zeros((9, 14, 3), np.uint8), stored.astype(np.uint16))
    dataset = tree.read(classes=many(classes), unseen=(), values=f"300-{299 + classes}", ignore_index=7)
    np.testing.assert_array_equal(dataset.mask(0), np.where(truth == NONE, 255, truth).astype(np.uint8), strict=True)


def test_what_is_neither_a_class_nor_ignored(tree: Tree) -> None:
    tree.add("a", np.zeros((1, 3, 3), np.uint8), np.array([[0, 300, 65535]], np.uint16))
    wide: dict[str, Any] = {"classes": many(300), "unseen": ()}
    with pytest.raises(BrokenFile, match="holds 300, which is neither a class nor ignored"):
        tree.read(**wide).mask(0)
    with pytest.raises(BrokenFile, match="holds 300, 65535, which"):
        tree.read(**wide, ignore_index=[]).mask(0)
    assert tree.read(**wide, ignore_index="others").mask(0).tolist() == [[0, NONE, NONE]]
    assert tree.read(classes=FEW, unseen=(), ignore_index="others").mask(0).tolist() == [[0, 255, 255]]
    named = tree.read(classes=FEW, unseen=(), values="300, 0, 9", ignore_index=["others", 65535])
    assert named.mask(0).tolist() == [[1, 0, 255]]


def test_datasets_check_counts_16_bit_masks(tree: Tree) -> None:
    rng, truths = np.random.default_rng(0), []
    for name in "ab":
        truths.append(draw(rng, 300))
        tree.add(name, np.zeros((9, 14, 3), np.uint8), truths[-1])
    found = check(tree.config(classes=many(300), unseen=()), tree.data_root)
    both = np.stack(truths)
    assert not found.faults and found.unlabelled == (both == NONE).sum()
    assert found.pixels.tolist() == [(both == index).sum() for index in range(300)]
    assert found.images.tolist() == [sum((truth == index).any() for truth in truths) for index in range(300)]


def test_values_that_are_all_ignored_are_doubted(tree: Tree) -> None:
    tree.add("a", np.zeros((2, 2, 3), np.uint8), np.full((2, 2), 1000, np.uint16))
    found = check(tree.config(classes=FEW, unseen=(), ignore_index="others"), tree.data_root)
    assert not found.faults and found.warnings == ["split train: no mask has a pixel of any class: check `values`"]


def test_training_takes_8_bits(tree: Tree) -> None:
    tree.add("a", np.zeros((9, 14, 3), np.uint8), draw(np.random.default_rng(0), 256))
    config = tree.config(classes=many(256), unseen=("c3",))
    for refused in (
        lambda: open_training_split(config, tree.data_root),
        lambda: SegmentationDataset(config, tree.data_root, "train").training_pair(0),
    ):
        with pytest.raises(UserError, match="tiny has 256 classes: training takes at most 255; more can be evaluated"):
            refused()


def test_a_seen_class_of_several_words_cannot_be_trained_on(tree: Tree) -> None:
    tree.fill(np.random.default_rng(0), 1, 3, 5)
    prompts = {"sky": {"any": ["sky", "cloud"]}}
    with pytest.raises(UserError, match=r"prompts\.sky is {any: \.\.\.}, but the class is seen"):
        open_training_split(tree.config(prompts=prompts), tree.data_root)
    assert len(open_training_split(tree.config(prompts=prompts, unseen=("sky",)), tree.data_root)) == 1


# The public layouts.


def read(name: str, data_root: Path) -> SegmentationDataset:
    return SegmentationDataset(Dataset.model_validate(dataset_settings(name)), data_root, "val")


def save(path: Path, pixels: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("seed", range(3))
def test_ade20k_847_as_converted(seed: int, tmp_path: Path) -> None:
    """Class k of 847 is k, 65535 is no class."""
    rng, root = np.random.default_rng(seed), tmp_path / "ADE20K_2021_17_01"
    truths = {f"ADE_val_0000000{index}": draw(rng, 847) for index in (3, 1)}
    for name, truth in truths.items():
        save(root / "images_detectron2" / "validation" / f"{name}.jpg", np.zeros((*truth.shape, 3), np.uint8))
        save(root / "annotations_detectron2" / "validation" / f"{name}.tif", truth)
    for data_root in (tmp_path, root):
        dataset = read("ade20k-847", data_root)
        assert dataset.ids == sorted(truths)
        for row, name in enumerate(dataset.ids):
            np.testing.assert_array_equal(dataset.pair(row)[1], truths[name], strict=True)


@pytest.mark.parametrize("seed", range(3))
def test_ade20k_847_as_released(seed: int, tmp_path: Path) -> None:
    """Number n of an object class is in a mask as (10 (n // 256) + something, n % 256, any instance)."""
    rng, root = np.random.default_rng(seed), tmp_path / "ADE20K_2021_17_01"
    numbers = np.array([[RELEASED[0], RELEASED[1], 0, 1], [RELEASED[2], 3688, RELEASED[3], RELEASED[4]]])
    red = 10 * (numbers // 256) + rng.integers(0, 10, numbers.shape)
    stored = np.stack([red, numbers % 256, rng.integers(0, 256, numbers.shape)], axis=2).astype(np.uint8)
    folder = root / "images" / "ADE" / "validation" / "urban" / "street"
    save(folder / "ADE_val_00000001.jpg", np.zeros((2, 4, 3), np.uint8))
    save(folder / "ADE_val_00000001_seg.png", stored)
    save(folder / "ADE_val_00000001_parts_1.png", stored)
    save(folder / "ADE_val_00000001" / "instance_000_ADE_val_00000001.png", stored[..., 0])
    dataset = read("ade20k-847-release", tmp_path)
    assert dataset.ids == ["urban/street/ADE_val_00000001"]
    assert dataset.mask(0).tolist() == [[0, 1, NONE, NONE], [2, NONE, 3, 4]]


# Numbers of wall, building, sky, tree and road among ADE20K's object classes, in Mask2Former's table.
RELEASED = [2978, 312, 2420, 2855, 2131]


def test_a_release_mask_that_is_grey(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "ADE" / "validation"
    save(folder / "a.jpg", np.zeros((2, 4, 3), np.uint8))
    save(folder / "a_seg.png", np.zeros((2, 4), np.uint8))
    with pytest.raises(BrokenFile, match="has mode L: masks must be RGB, for `coding: ade20k`"):
        read("ade20k-847-release", tmp_path).mask(0)


@pytest.mark.parametrize("ending", ["tif", "png"])
def test_pascal_context_459(ending: str, tmp_path: Path) -> None:
    """Label k of labels.txt is k - 1; what has none is 65535, of an unsigned 0 - 1."""
    rng, root = np.random.default_rng(0), tmp_path / "VOCdevkit" / "VOC2010"
    labels = {name: rng.integers(0, 460, (5, 7)).astype(np.uint16) for name in ("2008_2", "2008_1")}
    for name, label in labels.items():
        save(root / "JPEGImages" / f"{name}.jpg", np.zeros((5, 7, 3), np.uint8))
        save(root / "annotations_detectron2" / "pc459_val" / f"{name}.{ending}", label - np.uint16(1))
    (root / "pascalcontext_val.txt").write_text("\n".join(labels))
    dataset = read("pascal-context-459", tmp_path)
    assert dataset.ids == list(labels)
    for row, label in enumerate(labels.values()):
        wanted = np.where(label == 0, NONE, label.astype(int) - 1)
        assert dataset.mask(row).tolist() == wanted.tolist()
    assert dataset.config.classes[1] == "aeroplane" and dataset.config.classes[458] == "wool"
