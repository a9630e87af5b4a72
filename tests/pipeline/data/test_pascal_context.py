"""Pascal Context's masks: right classes in the right order, painted as the Detail API does, and whole or not there."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from configs.errors import UserError
from pipeline.data.pascal_context import CATEGORIES, write_context_masks
from tests.reference import Array

CLASS_NAMES = Path(__file__).resolve().parents[4] / "shared/data/class_names"
# Image ids of the file -> name, phase, (height, width). Not in the order of the names.
IMAGES = {
    2008000003: ("2008_000003", "train", (37, 50)),
    2010000007: ("2010_000007", "val", (1, 1)),
    2008000002: ("2008_000002", "val", (50, 37)),
    2009000001: ("2009_000001", "train", (64, 9)),
    2010009999: ("2010_009999", "test", (5, 5)),
}
WRITTEN = {name: size for name, phase, size in IMAGES.values() if phase != "test"}
LISTS = {"train": ["2008_000003", "2009_000001"], "val": ["2008_000002", "2010_000007"]}


def characters(number: int) -> str:
    """Five bits a character from the lowest on, two's complement; 32 says that more follow; "0" stands for 0."""
    text = ""
    while True:
        five, number = number % 32, number // 32
        last = number == (-1 if five >= 16 else 0)
        text += chr(48 + five + (0 if last else 32))
        if last:
            return text


def encode(binary: Array) -> str:
    """Compressed RLE: runs of 0, 1, 0, ... down the columns, from the fourth on less the one two before."""
    runs, value = [0], 0
    for x in range(binary.shape[1]):
        for y in range(binary.shape[0]):
            if binary[y, x] != value:
                value = int(binary[y, x])
                runs.append(0)
            runs[-1] += 1
    return "".join(characters(run - runs[i - 2] if i > 2 else run) for i, run in enumerate(runs))


def draw_region(rng: np.random.Generator, size: tuple[int, int]) -> Array:
    """A box, every second time with half of its pixels; it may be empty."""
    (top, bottom), (left, right) = (sorted(rng.integers(0, side + 1, 2)) for side in size)
    region = np.zeros(size, np.uint8)
    region[top:bottom, left:right] = rng.random((bottom - top, right - left)) < rng.choice([1.0, 0.5])
    return region


class Detail:
    """The file as the Detail API has it, over 460 categories, with overlapping annotations in no order of images."""

    def __init__(self, rng: np.random.Generator, root: Path) -> None:
        self.root, self.path = root, root / "trainval_merged.json"
        self.regions: list[tuple[int, int, Array]] = []  # image, category, pixels: as they are painted
        for _ in range(60):
            image = int(rng.choice(list(IMAGES)))
            category = int(rng.choice([*CATEGORIES, 0, 1, 459]))
            self.regions.append((image, category, draw_region(rng, IMAGES[image][2])))
        self.content: dict[str, Any] = {
            "info": {"version": "3.0"},
            "categories": [
                {"category_id": i, "name": CATEGORIES.get(i, f"other {i}"), "onlysemantic": 0} for i in range(460)
            ],
            "images": [
                {"image_id": i, "file_name": f"{name}.jpg", "phase": phase, "height": size[0], "width": size[1]}
                for i, (name, phase, size) in IMAGES.items()
            ],
            "annos_segmentation": [
                {"id": index, "image_id": image, "category_id": category, "iscrowd": 0, "parts": [],
                 "segmentation": {"size": list(region.shape), "counts": encode(region)}}
                for index, (image, category, region) in enumerate(self.regions)
            ],
        }  # fmt: skip

    def save(self) -> None:
        self.path.write_text(json.dumps(self.content))

    def expected(self, name: str) -> Array:
        """The mask pixel by pixel: the class of the last annotation that covers it, if it is one of the 59."""
        mask = np.zeros(WRITTEN[name], int)
        for y in range(mask.shape[0]):
            for x in range(mask.shape[1]):
                over = [c for image, c, region in self.regions if IMAGES[image][0] == name and region[y, x]]
                if over and over[-1] in CATEGORIES:
                    mask[y, x] = sorted(CATEGORIES).index(over[-1]) + 1
        return mask

    def written(self) -> set[str]:
        """Everything below the root but the file itself, hidden files too."""
        return {path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path != self.path}


@pytest.fixture
def detail(tmp_path: Path) -> Detail:
    made = Detail(np.random.default_rng(1), tmp_path)
    made.save()
    return made


@pytest.mark.parametrize("seed", range(5))
def test_masks_hold_the_last_annotation_of_the_59_classes(tmp_path: Path, seed: int) -> None:
    detail = Detail(np.random.default_rng(seed), tmp_path)
    detail.save()
    steps: list[tuple[int, int]] = []
    write_context_masks(tmp_path, lambda done, total: steps.append((done, total)))
    folder = tmp_path / "SegmentationClassContext"
    assert {path.name for path in folder.iterdir()} == {f"{name}.png" for name in WRITTEN}
    for name in WRITTEN:
        picture = Image.open(folder / f"{name}.png")
        assert picture.mode == "L"
        np.testing.assert_array_equal(np.asarray(picture), detail.expected(name))
    assert steps == [(done, len(WRITTEN)) for done in range(1, len(WRITTEN) + 1)]


def test_the_drawn_files_put_every_rule_to_the_test() -> None:
    """The test above says little unless classes overlap, and things beyond the 59 both hide classes and are hidden."""
    details = [Detail(np.random.default_rng(seed), Path()) for seed in range(5)]
    covered = [(image, c in CATEGORIES, region) for d in details for image, c, region in d.regions if region.size > 1]
    for below, above in [(True, True), (True, False), (False, True)]:
        assert any(
            image == other and known == below and over_known == above and (region * over).any()
            for index, (image, known, region) in enumerate(covered)
            for other, over_known, over in covered[index + 1 :]
            if region.shape == over.shape
        )


@pytest.mark.parametrize("size", [(1, 1), (37, 50), (700, 3)])
def test_the_file_is_encoded_as_pycocotools_does(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(4)
    regions = [np.zeros(size, np.uint8), np.ones(size, np.uint8), *(draw_region(rng, size) for _ in range(20))]
    for region in regions:
        assert encode(region) == rle.encode(np.asfortranarray(region))["counts"].decode()


def test_lists_are_sorted_and_leave_out_the_test_images(detail: Detail) -> None:
    write_context_masks(detail.root)
    for phase, names in LISTS.items():
        assert (detail.root / f"ImageSets/SegmentationContext/{phase}.txt").read_text().split("\n") == [*names, ""]
    folders = {"SegmentationClassContext", "ImageSets", "ImageSets/SegmentationContext"}
    lists = {f"ImageSets/SegmentationContext/{phase}.txt" for phase in LISTS}
    assert detail.written() == folders | lists | {f"SegmentationClassContext/{name}.png" for name in WRITTEN}


def test_lists_that_exist_stay(detail: Detail) -> None:
    listing = detail.root / "ImageSets/SegmentationContext/val.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text("my own\n")
    write_context_masks(detail.root)
    assert listing.read_text() == "my own\n"
    assert (listing.parent / "train.txt").read_text().split() == LISTS["train"]


def test_masks_that_exist_are_taken_as_they_are(detail: Detail) -> None:
    (detail.root / "SegmentationClassContext").mkdir()
    detail.path.write_text("not JSON")
    write_context_masks(detail.root)
    assert detail.written() == {"SegmentationClassContext"}


def test_a_kill_leaves_nothing_that_is_trusted(detail: Detail) -> None:
    """Killed outright, without a chance to tidy up: the next run starts over, whatever is still lying about."""
    program = (
        "import os, sys, pathlib; from pipeline.data.pascal_context import write_context_masks as write;"
        "write(pathlib.Path(sys.argv[1]), lambda done, total: os._exit(9) if done == 3 else None)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(detail.root)], cwd=Path(__file__).parents[3])
    assert killed.returncode == 9
    left = detail.written()
    assert len([name for name in left if name.endswith(".png")]) == 3
    assert all(name.startswith(".SegmentationClassContext-") for name in left)
    write_context_masks(detail.root)
    for name in WRITTEN:
        found = Image.open(detail.root / "SegmentationClassContext" / f"{name}.png")
        np.testing.assert_array_equal(np.asarray(found), detail.expected(name))


def test_an_error_midway_leaves_nothing_at_all(detail: Detail) -> None:
    detail.content["annos_segmentation"][-1]["segmentation"]["counts"] = "0"
    detail.save()
    with pytest.raises(UserError):
        write_context_masks(detail.root)
    assert detail.written() == set()


def test_another_process_may_be_first(detail: Detail) -> None:
    other = detail.root / "SegmentationClassContext"

    def first(done: int, total: int) -> None:
        if done == 1:
            other.mkdir()
            (other / "theirs.png").touch()

    write_context_masks(detail.root, first)
    assert [path.name for path in other.iterdir()] == ["theirs.png"]


@pytest.mark.parametrize("there", [True, False])
def test_neither_masks_nor_file(tmp_path: Path, there: bool) -> None:
    root = tmp_path if there else tmp_path / "VOC2010"
    with pytest.raises(UserError) as error:
        write_context_masks(root)
    message = str(error.value)
    assert all(part in message for part in (str(root), "SegmentationClassContext", "trainval_merged.json"))
    assert "\n" not in message


@pytest.mark.parametrize("damage", [b"", b'{"images": [', b"[]", b"\xff{}", b'{"categories": {}}'])
def test_not_the_file(detail: Detail, damage: bytes) -> None:
    detail.path.write_bytes(damage)
    with pytest.raises(UserError, match="trainval_merged") as error:
        write_context_masks(detail.root)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *((("categories", 7, key), None) for key in ("category_id", "name")),
        *((("images", 2, key), None) for key in ("image_id", "file_name", "phase", "height", "width")),
        (("images", 2), "a text"),
        (("images", 2, "file_name"), ""),
        (("images", 2, "file_name"), "2008_000003.jpg"),
        (("images", 2, "image_id"), 2008000003),
        (("images", 2, "width"), 0),
        (("images", 2, "height"), "50"),
        *((("annos_segmentation", 11, key), None) for key in ("image_id", "category_id", "segmentation")),
        (("annos_segmentation", 11, "image_id"), 2008000004),
        (("annos_segmentation", 11, "segmentation"), [[0, 0, 9, 0, 9, 9]]),
        (("annos_segmentation", 11, "segmentation", "size"), None),
        (("annos_segmentation", 11, "segmentation", "size"), [50, 38]),
        (("annos_segmentation", 11, "segmentation", "size"), [37, 50]),
        (("annos_segmentation", 11, "segmentation", "counts"), None),
        (("annos_segmentation", 11, "segmentation", "counts"), [0, 1850]),
        (("annos_segmentation", 11, "segmentation", "counts"), ""),
        (("annos_segmentation", 11, "segmentation", "counts"), characters(1850)[:-1]),  # breaks off within a number
        (("annos_segmentation", 11, "segmentation", "counts"), characters(1849)),
        (("annos_segmentation", 11, "segmentation", "counts"), characters(1851)),
        (("annos_segmentation", 11, "segmentation", "counts"), characters(1851) + characters(-1)),
        (("annos_segmentation", 11, "segmentation", "counts"), characters(1850) + "é"),
    ],
)  # fmt: skip
def test_damage_is_named(detail: Detail, path: tuple[str | int, ...], value: object) -> None:
    """None stands for a missing key. Annotation 11 is made one of the image of 50 x 37 that covers none of it."""
    annotation = detail.content["annos_segmentation"][11]
    annotation |= {"image_id": 2008000002, "segmentation": {"size": [50, 37], "counts": characters(1850)}}
    detail.save()
    write_context_masks(detail.root)  # as yet in order
    for mask in (detail.root / "SegmentationClassContext").iterdir():
        mask.unlink()
    (detail.root / "SegmentationClassContext").rmdir()

    place: Any = detail.content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    if value is None:
        del place[path[-1]]
    detail.save()
    with pytest.raises(UserError) as error:
        write_context_masks(detail.root)
    message = str(error.value)
    assert str(detail.path) in message and f"{path[0]}[{path[1]}]" in message and "\n" not in message
    assert not (detail.root / "SegmentationClassContext").exists()


@pytest.mark.parametrize("key", ["categories", "images", "annos_segmentation"])
def test_a_part_is_missing(detail: Detail, key: str) -> None:
    del detail.content[key]
    detail.save()
    with pytest.raises(UserError, match=key):
        write_context_masks(detail.root)


@pytest.mark.parametrize("change", ["swapped", "missing"])
def test_another_numbering_is_refused(detail: Detail, change: str) -> None:
    """A file whose ids mean other classes would give wrong masks without a word."""
    second, ninth = detail.content["categories"][2], detail.content["categories"][9]
    if change == "swapped":
        second["name"], ninth["name"] = ninth["name"], second["name"]
    else:
        detail.content["categories"].remove(second)
    detail.save()
    with pytest.raises(UserError, match=r"category 2 .*aeroplane"):
        write_context_masks(detail.root)


def test_table_is_diningtable(detail: Detail) -> None:
    detail.content["categories"][397]["name"] = "table"
    detail.save()
    write_context_masks(detail.root)
    assert (detail.root / "SegmentationClassContext").is_dir()


def named_lines(file: str) -> dict[int, str]:
    """The "number: name" lines of a list among the shared class names."""
    path = CLASS_NAMES / file
    if not path.is_file():
        pytest.skip(f"no shared class names at {path}")
    return {int(number): name for number, name in (line.split(": ") for line in path.read_text().strip().split("\n"))}


def test_ids_are_those_of_the_official_459_classes() -> None:
    official = named_lines("pascal_context_classes-400_fcn.txt")
    assert len(official) == 459
    differing = {i: official[i] for i, name in CATEGORIES.items() if official[i] != name}
    assert differing == {397: "table"}


def test_the_59_are_the_right_ones_in_ascending_order() -> None:
    same = {"clothes": "cloth", "bedcloth": "bedclothes"}
    listed = [same.get(name, name) for number, name in named_lines("pascal_context_59_fcn.txt").items() if number]
    assert len(CATEGORIES) == 59 and sorted(listed) == sorted(CATEGORIES.values())
    assert list(CATEGORIES) == sorted(CATEGORIES)
    assert list(CATEGORIES.values()) == json.loads((CLASS_NAMES / "catseg_pc59.json").read_text())
