"""`datasets list`, `show` and `check` through the front door: every fault is named with its file."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console

from configs.dataset import Dataset
from configs.load import dataset_settings
from stages.common import datasets, progress
from stages.verbs import report
from tests.conftest import ROOT, World
from tests.pipeline.data.trees import CLASSES, UNSEEN, draw_pair
from tests.reference import NONE, Array

SHARED = ROOT.parent / "shared" / "data"
Damage = Callable[[Path], None]
Histogram = dict[str, tuple[str, int, int]]


def described(folder: Path, **changes: Any) -> dict[str, Any]:
    """YAML of dataset `shelf`; its values are not the classes' indices."""
    files = {"images": "images/{id}.*", "masks": "masks/{id}.png"}
    settings = {
        "name": "shelf", "classes": list(CLASSES), "unseen": list(UNSEEN), "values": "1-2, 7-9", "ignore_index": [0],
        "splits": {"train": files},
    } | changes  # fmt: skip
    (folder / "shelf.yaml").write_text(yaml.safe_dump(settings))
    return settings


def add(root: Path, image_id: str, seed: int, height: int = 9, width: int = 12) -> Array:
    """A pair below `root`; returns the mask as classes, 255 where there is none."""
    image, mask = draw_pair(np.random.default_rng(seed), height, width, none=0.3)
    for folder in ("images", "masks"):
        (root / folder / image_id).parent.mkdir(parents=True, exist_ok=True)
    coded = np.array([1, 2, 7, 8, 9], np.uint8)[np.where(mask == NONE, 0, mask)]
    Image.fromarray(image).save(root / "images" / f"{image_id}.png")
    Image.fromarray(np.where(mask == NONE, 0, coded)).save(root / "masks" / f"{image_id}.png")
    return mask


def histogram(output: str) -> Histogram:
    """Class -> (marked unseen, images, pixels), from the table."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    return {name: (mark, int(i.replace(",", "")), int(p.replace(",", ""))) for name, mark, i, p, _ in rows}


def counted(masks: list[Array], unseen: tuple[str, ...] = UNSEEN) -> Histogram:
    return {
        name: (
            "unseen" if name in unseen else "",
            sum(bool((mask == k).any()) for mask in masks),
            sum(int((mask == k).sum()) for mask in masks),
        )
        for k, name in enumerate(CLASSES)
    }


def faults(output: str) -> list[str]:
    return [line.removeprefix("fault: ") for line in output.splitlines() if line.startswith("fault: ")]


def checked(world: World, *arguments: str | Path) -> tuple[str, list[str]]:
    """Output and faults of a check that finds some; their number is the last thing said."""
    done = world.run("datasets", "check", *arguments, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    found = faults(done.stdout)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and f" has {len(found)} fault" in said[0]
    return done.stdout, found


# --- one fault at a time, without the command line ---


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def rewrite(change: Callable[[Array], Array]) -> Damage:
    def damage(file: Path) -> None:
        with Image.open(file) as picture:
            pixels = np.array(picture)
        Image.fromarray(change(pixels)).save(file)

    return damage


def one_value(value: int) -> Callable[[Array], Array]:
    def change(mask: Array) -> Array:
        mask[-1, -1] = value
        return mask

    return change


FILE_FAULTS: dict[str, tuple[str, Damage, str]] = {
    "image missing": ("images", Path.unlink, "missing image {}"),
    "mask missing": ("masks", Path.unlink, "missing mask {}: "),
    "image cut": ("images", truncate, "image {} is truncated or not an image ("),
    "mask cut": ("masks", truncate, "mask {} is truncated or not an image ("),
    "image empty": ("images", lambda file: file.write_bytes(b"") and None, "image {} is truncated or not an image ("),
    "no image": ("images", lambda file: file.write_text("text") and None, "image {} is truncated or not an image ("),
    "no mask": ("masks", lambda file: file.write_text("text") and None, "mask {} is truncated or not an image ("),
    "mask in colours": ("masks", rewrite(lambda m: np.stack([m] * 3, axis=2)), "mask {} has mode RGB: masks must be"),
    "mask of 16 bits": ("masks", rewrite(lambda m: m * np.uint16(257)), "mask {} holds "),
    "mask of 1 bit": ("masks", rewrite(lambda m: m > 4), "mask {} has mode 1: masks must be 8- or 16-bit"),
    "mask as JPEG": (
        "masks",
        lambda file: Image.open(file).save(file, "JPEG"),
        "mask {} is saved as JPEG, which ",
    ),
    "mask of another size": ("masks", rewrite(lambda m: m[:-1]), "mask {} is 12 x 8 but its image is 12 x 9: both"),
    "mask turned": ("masks", rewrite(lambda m: m.T.copy()), "mask {} is 9 x 12 but its image is 12 x 9: both"),
    "value between": ("masks", rewrite(one_value(3)), "mask {} holds 3, which is neither a class nor ignored: "),
    "value beyond": ("masks", rewrite(one_value(255)), "mask {} holds 255, which is neither a class nor ignored: "),
}


@pytest.mark.parametrize("name", FILE_FAULTS)
def test_one_broken_file_is_one_fault(name: str, tmp_path: Path) -> None:
    """Which is named; all other files are counted."""
    kind, damage, message = FILE_FAULTS[name]
    files = {"images": "images/{id}.png", "masks": "masks/{id}.png", "count": 4}
    config = Dataset(**described(tmp_path, splits={"train": files}))
    masks = [add(tmp_path / "shelf", f"{index}", index) for index in range(4)]
    (tmp_path / "shelf" / "list.txt").write_text("0\n1\n2\n3\n")
    if name == "image missing":  # nobody misses it unless it is listed
        config = Dataset(**described(tmp_path, splits={"train": files | {"ids": "list.txt"}}))
    file = tmp_path / "shelf" / kind / "2.png"
    damage(file)
    found = datasets.check(config, tmp_path)
    assert len(found.faults) == 1 and found.faults[0].startswith(message.format(file)), found.faults
    assert "\n" not in found.faults[0] and found.readable == 3
    others = counted([masks[0], masks[1], masks[3]])
    assert found.pixels.tolist() == [others[c][2] for c in CLASSES]
    assert found.images.tolist() == [others[c][1] for c in CLASSES]


FILES = {"images": "images/{id}.png", "masks": "masks/{id}.png"}
LATER = {kind: f"later/{pattern}" for kind, pattern in FILES.items()}
SPLIT_FAULTS: dict[str, tuple[dict[str, Any], str, int]] = {
    "fewer": ({"count": 3}, "{root}: split train has 2 images, expected 3", 2),
    "more": ({"count": 1}, "{root}: split train has 2 images, expected 1", 2),
    "no list": ({"ids": "none.txt"}, "cannot read the split list {root}/none.txt: ", 0),
    "no second list": ({"ids": ["list.txt", "none.txt"]}, "cannot read the split list {root}/none.txt: ", 0),
    "empty list": ({"ids": "empty.txt"}, "the split list {root}/empty.txt is empty: ", 0),
    "id twice": ({"ids": ["list.txt", "again.txt"]}, "split train of {root} lists '1' more than once: ", 2),
    "no folder": ({"images": "pictures/{id}.png"}, "no folder {root}/pictures", 0),
    "no file": ({"images": "images/{id}.jpg"}, "{root} holds no file images/{{id}}.jpg: ", 0),
}


@pytest.mark.parametrize("name", SPLIT_FAULTS)
def test_one_broken_split_is_one_fault(name: str, tmp_path: Path) -> None:
    """The other split is read all the same."""
    changes, message, files = SPLIT_FAULTS[name]
    root = tmp_path / "shelf"
    for index in range(2):
        add(root, f"{index}", index)
        add(root / "later", f"{index}", index)
    (root / "list.txt").write_text("0\n1\n")
    (root / "again.txt").write_text("1\n")
    (root / "empty.txt").write_text("")
    splits = {"train": FILES | changes, "val": LATER}
    found = datasets.check(Dataset(**described(tmp_path, splits=splits)), tmp_path)
    assert len(found.faults) == 1 and found.faults[0].startswith(message.format(root=root)), found.faults
    assert found.readable == files + 2


def test_images_of_two_splits_are_a_fault(tmp_path: Path) -> None:
    root = tmp_path / "shelf"
    for index in range(3):
        add(root, f"{index}", index)
    for name, ids in {"train": "012", "val": "21", "test": "0"}.items():
        (root / f"{name}.txt").write_text("\n".join(ids))
    splits = {name: FILES | {"ids": f"{name}.txt"} for name in ("train", "val", "test")}
    found = datasets.check(Dataset(**described(tmp_path, splits=splits)), tmp_path)
    assert found.faults == [
        f"splits train and val share 2 images, {root}/images/1.png is the first: keep each in one",
        f"splits train and test share 1 images, {root}/images/0.png is the first: keep each in one",
    ]
    assert found.readable == 6


def test_open_split_warns_of_a_miscount_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(tmp_path / "shelf", "0", 0)
    for count, warned in ((1, False), (2, True), (None, False)):
        config = Dataset(**described(tmp_path, splits={"train": FILES | {"count": count}}))
        assert len(datasets.open_split(config, tmp_path, "train")) == 1
        said = capsys.readouterr()
        expected = f"warning: {tmp_path}/shelf: split train has 1 images, expected 2; run `datasets check shelf` to see"
        assert said.out == "" and said.err.startswith(expected) == warned
        assert said.err.count("\n") == warned


# --- the commands ---


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_clean_tree(world: World) -> None:
    """Two splits, ids with folders, odd names: no fault, and the histogram of them all."""
    root = world.data / "shelf"
    names = ["a", "b.c", "deep/er/d", "[red]x[/red]", "train-[b]"]
    masks = [add(root, name, index, 40, 31 + index) for index, name in enumerate(names)]
    held_out = np.full((40, 31), NONE, np.uint8)  # no class at all
    add(root, "val", 9)
    Image.fromarray(np.zeros((40, 31), np.uint8)).save(root / "masks" / "val.png")
    Image.fromarray(np.zeros((40, 31, 3), np.uint8)).convert("CMYK").save(root / "images" / "val.jpg")
    (root / "images" / "val.png").unlink()
    (root / "train.txt").write_text("\n".join(names))
    (root / "val.txt").write_text("val\n")
    files = {"images": "images/{id}.*", "masks": ["gone/{id}.png", "masks/{id}.png"]}
    splits = {"train": files | {"ids": "train.txt", "count": 5}, "val": files | {"ids": ["val.txt"], "count": 1}}
    described(world.folder, splits=splits)
    done = world.run("datasets", "check", "shelf.yaml")
    masks.append(held_out)
    assert histogram(done.stdout) == counted(masks)
    total = sum(pixels for _, _, pixels in counted(masks).values())
    shares = [100 * pixels / total for _, _, pixels in counted(masks).values()]
    assert re.findall(r"(\d+\.\d\d) %", done.stdout) == [f"{share:.2f}" for share in shares]
    assert f"6 images, {sum(int((mask == NONE).sum()) for mask in masks):,} pixels without a class" in done.stdout
    assert faults(done.stdout) == [] and "error" not in done.stderr


def test_every_fault_of_one_tree(world: World) -> None:
    """Each is one line with its file, names are printed as they are, and what is sound is counted."""
    root = world.data / "shelf"
    expected, sound = [], []
    for number, (name, (kind, damage, message)) in enumerate(FILE_FAULTS.items()):
        image_id = f"[red]{number}[/red]"
        add(root, image_id, number)
        damage(root / kind / f"{image_id}.png")
        file = Path("data") / "shelf" / kind / f"{image_id}.png"
        expected.append(message.format(file).replace(".png", ".*" if name == "image missing" else ".png"))
    for number in range(3):
        sound.append(add(root, f"sound/{number}", 100 + number))
    (root / "train.txt").write_text("".join(f"[red]{number}[/red]\n" for number in range(len(FILE_FAULTS))))
    (root / "sound.txt").write_text("sound/0\nsound/1\nsound/2\n")
    (root / "empty.txt").write_text("\n")
    again = add(root, "[x]", 200)
    (root / "twice.txt").write_text("[x]\n[x]\n")
    files = {"images": "images/{id}.*", "masks": "masks/{id}.png"}
    splits = {
        "train": files | {"ids": "train.txt", "count": len(FILE_FAULTS)},
        "fewer": files | {"ids": "sound.txt", "count": 4},
        "more": files | {"ids": "sound.txt", "count": 2},
        "none": files | {"ids": "none.txt"},
        "empty": files | {"ids": ["empty.txt"]},
        "twice": files | {"ids": ["twice.txt"]},
        "no-images": files | {"images": "images/sound/{id}.jpg"},
        "no-folder": files | {"images": "pictures/{id}.jpg"},
    }
    described(world.folder, splits=splits)
    expected += [
        "data/shelf: split fewer has 3 images, expected 4",
        "data/shelf: split more has 3 images, expected 2",
        "splits fewer and more share 3 images, data/shelf/images/sound/0.png is the first: keep each in one",
        "cannot read the split list data/shelf/none.txt: ",
        "the split list data/shelf/empty.txt is empty: ",
        "split twice of data/shelf lists '[x]' more than once: ",
        "data/shelf holds no file images/sound/{id}.jpg: ",
        "no folder data/shelf/pictures",
    ]
    output, found = checked(world, "shelf.yaml")
    for message in expected:
        assert sum(fault.startswith(message) for fault in found) == 1, (message, found)
    assert len(found) == len(expected)
    assert histogram(output) == counted([*sound, *sound, again]) and "\n7 images, " in output


def test_no_dataset(world: World) -> None:
    described(world.folder)
    _, found = checked(world, "shelf.yaml", "--data-root", "nowhere")
    assert len(found) == 1 and found[0].startswith("no folder nowhere/shelf") and "--data-root" in found[0]


def test_unknown_names(world: World) -> None:
    assert "unknown dataset 'coco_stuff'; did you mean 'coco-stuff'?" in world.fails("datasets", "check", "coco_stuff")


def test_list_names_all(world: World) -> None:
    output = world.run("datasets", "list").stdout
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    assert {name: (int(classes), int(unseen)) for name, classes, unseen, _ in rows} == {
        "ade20k": (150, 0),
        "cityscapes": (19, 0),
        "coco-stuff": (171, 15),
        "pascal-context": (59, 10),
        "pascal-context-60": (60, 11),
        "pascal-context-459": (459, 0),
        "ade20k-847": (847, 0),
        "ade20k-847-release": (847, 0),
        "pascal-voc-21": (21, 6),
        "pascal-voc": (20, 5),
        "scenes": (20, 6),
    }
    images = {row[0]: row[3] for row in rows}
    assert images["coco-stuff"] == "train 118287, val 5000" and images["pascal-voc"] == "train 10582, val 1449"


def test_show(world: World) -> None:
    """Of COCO-Stuff: official values with their gaps, prompts, the unseen, and where files are looked for."""
    output = world.run("datasets", "show", "coco-stuff", "--data-root", "/somewhere").stdout
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    table = {name: (int(value), mark, prompts) for value, name, mark, prompts in rows}
    settings = Dataset(**dataset_settings("coco-stuff"))
    assert list(table) == list(settings.classes) and len(table) == 171
    dropped = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}  # labels from 0 that COCO has no pictures of
    assert [value for value, _, _ in table.values()] == [v for v in range(182) if v not in dropped]
    assert {name for name, (_, mark, _) in table.items() if mark == "unseen"} == set(settings.unseen)
    assert len(settings.unseen) == 15 and {"cow", "grass", "tree"} <= set(settings.unseen)
    for name, (_, names) in zip(settings.classes, settings.channels, strict=True):
        assert table[name][2] == ", ".join(names)
    for text in ("/somewhere/coco_stuff164k", "images/train2017/{id}.jpg", "annotations/val2017/{id}.png", "0-170"):
        assert text in output
    assert "118287" in output and "ignored values: " in output


def test_show_cuts_no_pattern_and_takes_no_markup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a terminal of any width."""
    text = io.StringIO()
    monkeypatch.setattr(progress, "output", Console(file=text, width=60, soft_wrap=True))
    pattern = "[red]a/very/long/folder/that/fits/no/narrow/terminal/[/red]/{id}_leftImg8bit.png"
    config = Dataset(**described(tmp_path, splits={"train": {"images": pattern, "masks": [pattern, "m/{id}.*"]}}))
    report.dataset_layout(config, tmp_path / "[/bold]")
    assert text.getvalue().count(pattern) == 2
    assert str(tmp_path / "[/bold]" / "shelf") in text.getvalue()


def test_markup_in_names_of_classes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ["[red]sky[/red]", "[/red]", "[b]", "cat", "a[0]"]
    changes = {"classes": names, "unseen": ["[b]"], "prompts": {"cat": "[i]cat"}}
    config = Dataset(**described(tmp_path, **changes, splits={"train": FILES}))
    add(tmp_path / "shelf", "0", 0)
    text = io.StringIO()
    for module in (report, progress):
        monkeypatch.setattr(module, "output", Console(file=text, width=100, soft_wrap=True))
    report.check_table(config, datasets.check(config, tmp_path))
    report.dataset_layout(config, tmp_path)
    for name in [*names, "[i]cat"]:
        assert text.getvalue().count(f" {name} ") >= 2 - (name == "[i]cat"), name


def test_markup_in_names_of_splits(tmp_path: Path) -> None:
    """They name the progress bars."""
    add(tmp_path / "shelf", "0", 0)
    config = Dataset(**described(tmp_path, splits={"[/red]": FILES}))
    assert datasets.check(config, tmp_path).faults == []


# --- real samples ---


@pytest.mark.parametrize(
    ("name", "folder", "counts"),
    [
        ("coco-stuff", "cocostuff_spade_sample", {"train": (13, 118287), "val": (8, 5000)}),
        ("ade20k", "ade20k_sample", {"train": (7, 20210), "val": (9, 2000)}),
    ],
)
def test_samples_of_real_datasets(name: str, folder: str, counts: dict[str, tuple[int, int]], world: World) -> None:
    """A few files as their makers publish them: nothing but their number is wrong, and every pixel is counted."""
    root = SHARED / folder
    if not root.is_dir():
        pytest.skip(f"no {root}")
    output, found = checked(world, name, "--data-root", root)
    expected = [f"{root}: split {split} has {n} images, expected {full}" for split, (n, full) in counts.items()]
    assert sorted(fault.split(";")[0] for fault in found) == sorted(expected)
    settings = Dataset(**dataset_settings(name))
    values = np.zeros(256, np.int64)
    images = np.zeros(256, np.int64)
    masks = [path for path in sorted((root / "annotations").rglob("*.png")) if "labelTrainIds" not in path.name]
    for path in masks:
        with Image.open(path) as picture:
            counted = np.bincount(np.asarray(picture).ravel(), minlength=256)
        values += counted
        images += counted > 0
    table = histogram(output)
    assert list(table) == list(settings.classes)
    for label, value in zip(settings.classes, settings.value_of_class(None), strict=True):
        assert table[label] == ("unseen" if label in settings.unseen else "", images[value], values[value])
    ignored = sum(int(values[value]) for value in settings.ignore_index)
    assert f"{len(masks):,} images, {ignored:,} pixels without a class" in output
    assert sum(pixels for _, _, pixels in table.values()) + ignored == values.sum()


def test_the_fix_list_holds_what_is_good(tmp_path: Path) -> None:
    """A dataset with these lists has no faults."""
    here, root = World(tmp_path), tmp_path / "shelf"
    for index, name in enumerate(("a", "deep/b", "c", "d")):
        add(root, name, index)
    (root / "images" / "c.png").write_bytes(b"no image")
    (root / "masks" / "d.png").unlink()
    files = {"images": "images/{id}.*", "masks": "masks/{id}.png"}
    for split, ids in {"train": ["a", "c", "d"], "val": ["deep/b"]}.items():
        (root / f"{split}.txt").write_text("\n".join(ids))
    described(tmp_path, splits={split: {**files, "ids": f"{split}.txt"} for split in ("train", "val")})
    command = ("datasets", "check", "shelf.yaml", "--data-root", ".", "--fix-list")
    assert "has the splits train, val: put {split} into the name" in here.fails(*command, "good.txt")
    assert "2 faults" in here.fails(*command, "shelf/good-{split}.txt")
    assert (root / "good-train.txt").read_text() == "a\n" and (root / "good-val.txt").read_text() == "deep/b\n"
    assert "good-train.txt exists already" in here.fails(*command, "shelf/good-{split}.txt")
    described(tmp_path, splits={split: {**files, "ids": f"good-{split}.txt"} for split in ("train", "val")})
    here.run("datasets", "check", "shelf.yaml", "--data-root", ".")
