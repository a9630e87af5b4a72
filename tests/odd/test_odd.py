"""Every verb over the list of odd inputs: no traceback, no exit code 1, nothing silent; and the page shows the list."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from configs.load import resolve
from pipeline.data.dataset import SegmentationDataset
from pipeline.data.files import BrokenFile
from tests.conftest import ROOT, World, write_teacher
from tests.odd.inputs import (
    ALL,
    CLASSES,
    MASKS,
    PHOTOS,
    PICTURE,
    SETTINGS,
    TREES,
    TRUTH,
    VERDICTS,
    WORDS,
    File,
    Odd,
    Settings,
    Tree,
    Words,
)  # fmt: skip

FILES = [*PHOTOS, *MASKS]
EXPERIMENT = {
    "dataset": "odd.yaml",
    "teacher": {"model": "tiny-vit.json", "pretrained": "tiny-vit.safetensors"},
    "views": {"size": 64, "count": 1, "crop": "whole"},
    "storage": {"shard_images": 64},
    "student": {"model": "timm:tf_efficientnet_lite0", "weights": "none", "channels": 16},
    "loss": {"label_stride": 2, "bank": 1},
    "train": {"iterations": 2, "batch_size": 4, "workers": 0, "validate_every": 2},
    "evaluate": {"gamma": 0.0},
}
DATASET = {
    "name": "odd", "classes": CLASSES, "unseen": ["cow"],
    "splits": {
        "train": {"images": "photos/{id}.*", "masks": "masks/{id}.*"},
        "val": {"images": "val/photos/{id}.*", "masks": "val/masks/{id}.*"},
    },
}  # fmt: skip


def pair(root: Path, name: str) -> None:
    for folder in ("photos", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(PICTURE).save(root / "photos" / f"{name}.jpg")
    Image.fromarray(TRUTH).save(root / "masks" / f"{name}.png")


def plain(folder: Path, settings: dict[str, Any]) -> World:
    """Six pairs to train on, two to test on, and their YAML."""
    for number in range(6):
        pair(folder / "data" / "odd", f"train-{number}")
    for number in range(2):
        pair(folder / "data" / "odd" / "val", f"val-{number}")
    (folder / "data" / "odd" / "train.txt").write_text("".join(f"train-{number}\n" for number in range(6)))
    (folder / "odd.yaml").write_text(yaml.safe_dump(settings))
    (folder / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    return World(folder)


def said(odd: Odd, lines: Sequence[str], name: str = "") -> list[str]:
    return [line for line in lines if odd.says in line and name in line]


def lines(output: str, kind: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith(f"{kind}: ")]


def done(world: World, *arguments: str | Path, code: int = 0) -> tuple[str, str]:
    """Output and errors; exit code 1 and tracebacks are nobody's."""
    ended = world.run(*arguments, check=False)
    assert ended.returncode == code and "Traceback" not in ended.stderr, (arguments, ended.stdout, ended.stderr)
    assert len(lines(ended.stderr, "error")) == (code == 2)
    return ended.stdout, ended.stderr


# --- files: one dataset of them all ---


def slug(odd: File) -> str:
    """The id; those of names of their own are the name's."""
    return odd.name.rpartition(".")[0] or f"f{FILES.index(odd):02}"


def place(odd: File) -> str:
    return odd.name if "." in odd.name else f"{slug(odd)}.{odd.name}"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Every file of the list among sound ones; a cache of those that can be read, and a run."""
    folder = tmp_path_factory.mktemp("odd")
    write_teacher(folder)
    root = folder / "data" / "odd"
    named = [odd for odd in FILES if odd.verdict == "named"]
    splits: dict[str, dict[str, str]] = {"train": {"ids": "train.txt"}, "val": {"ids": "val.txt"}}
    splits |= {slug(odd): {"ids": f"{slug(odd)}.txt"} for odd in named}
    patterns = DATASET["splits"]["train"]  # type: ignore[index]
    settings = DATASET | {"splits": {name: patterns | split for name, split in splits.items()}}
    world = plain(folder, settings)
    for odd in FILES:
        pair(root, slug(odd))
        sound = root / ("masks" if odd.mask else "photos") / f"{slug(odd)}.{'png' if odd.mask else 'jpg'}"
        sound.unlink()
        odd.make(sound.parent / place(odd))
        (root / f"{slug(odd)}.txt").write_text(f"{slug(MASKS[0])}\n{slug(odd)}\n")  # a sound one before
    ids = [slug(odd) for odd in FILES]
    (root / "train.txt").write_text("\n".join(ids))
    (root / "val.txt").write_text("\n".join(slug(odd) for odd in FILES if odd.verdict != "named"))
    command = ("precompute", "--config", "experiment.yaml", "--cache", "caches/odd", "--device", "cpu")
    assert any(said(odd, [done(world, *command, code=2)[1]], slug(odd)) for odd in named)
    done(world, *command, "--on-error", "skip")
    done(world, "train", "--config", "experiment.yaml", "--cache", "caches/odd", "--run", "runs/odd", "--device", "cpu")
    return world


def test_files_are_checked(files: World) -> None:
    settings = yaml.safe_load((files.folder / "odd.yaml").read_text())
    settings["splits"] = {"train": settings["splits"]["train"]}
    (files.folder / "train.yaml").write_text(yaml.safe_dump(settings))
    output, _ = done(files, "datasets", "check", "train.yaml", code=2)
    faults = lines(output, "fault")
    for odd in FILES:
        about = [fault for fault in faults if f"/{slug(odd)}." in fault.partition(" from ")[0]]
        assert len(about) == (odd.verdict == "named"), (odd, faults)
        assert odd.verdict != "named" or len(said(odd, faults, f"/{slug(odd)}.")) == 1, (odd, faults)
    warned = [odd for odd in FILES if odd.verdict == "warned"]
    (warning,) = lines(output, "warning")
    assert said(warned[0], [warning]) and f" {len(warned)} masks" in warning


def test_files_mean_what_they_show(files: World) -> None:
    """Every mask that is read is the true one, and every photo close to the picture."""
    dataset = SegmentationDataset(resolve(str(files.folder / "odd.yaml")).dataset, files.data, "train")
    for odd in FILES:
        row = dataset.ids.index(slug(odd))
        if odd.verdict == "named":
            with pytest.raises(BrokenFile):
                dataset.pair(row)
            continue
        image, mask = dataset.pair(row)
        np.testing.assert_array_equal(mask, TRUTH, err_msg=odd.what)
        blocks = [part[:, 30:].astype(int).reshape(6, 10, 5, 10, 3).mean(axis=(1, 3, 4)) for part in (image, PICTURE)]
        assert np.abs(blocks[0] - blocks[1]).max() < 60, odd.what
        assert bool(dataset.doubts(row)) == (odd.verdict == "warned"), odd.what


def test_files_are_left_out_of_the_cache(files: World) -> None:
    skipped = json.loads((files.folder / "caches" / "odd" / "manifest.json").read_text())["skipped"]
    assert set(skipped) == {slug(odd) for odd in FILES if odd.verdict == "named"}
    for odd in FILES:
        assert odd.verdict != "named" or said(odd, [skipped[slug(odd)]])


@pytest.mark.parametrize("odd", [odd for odd in FILES if odd.verdict == "named"], ids=lambda odd: odd.what)
def test_a_file_stops_evaluation(odd: File, files: World) -> None:
    _, errors = done(files, "evaluate", "--run", "runs/odd", "--set", f"evaluate.split={slug(odd)}", code=2)
    assert said(odd, lines(errors, "error"), slug(odd))


@pytest.mark.slow
def test_files_through_the_other_verbs(files: World) -> None:
    done(files, "evaluate", "--run", "runs/odd")
    done(files, "inspect-pseudolabels", "--cache", "caches/odd", "--terminal")
    done(files, "inspect-pseudolabels", "--cache", "caches/odd", "--output", "gallery")
    left_out = next(odd for odd in FILES if odd.verdict == "named")
    done(files, "inspect-pseudolabels", "--cache", "caches/odd", "--image", slug(left_out), code=2)
    pytest.importorskip("onnxruntime")
    done(files, "export", "--run", "runs/odd", "--output", "exported")


def test_predict_takes_a_folder_of_them(files: World) -> None:
    """Also one with a name so long that its results cannot be written; subfolders are ignored with a line."""
    folder = files.folder / "photos"
    shutil.copytree(files.data / "odd" / "photos", folder, symlinks=True, ignore=lambda *_: {
        place(odd) for odd in PHOTOS if "pipe" in odd.what})  # fmt: skip
    long = next(odd.name for odd in PHOTOS if len(odd.name) > 200)
    (folder / "._a.jpg").write_bytes(b"\0\5\x16\7")
    _, errors = done(files, "predict", folder, "--run", "runs/odd", "--output", "found", code=2)
    left_out = lines(errors, "skipped")
    bad = [odd for odd in PHOTOS if odd.verdict == "named" and (folder / place(odd)).is_file()]
    bad += [odd for odd in PHOTOS if "a link to" in odd.what]
    for odd in bad:
        assert len(said(odd, left_out, place(odd))) == 1 or "missing" in odd.says, (odd, left_out)
    assert len([line for line in left_out if long in line and "File name too long" in line]) == 1
    assert len(left_out) == len(bad) + 1, left_out
    for file in (files.folder / "photos").iterdir():
        written = file.name != long and not file.name.startswith(".") and not any(f"{file} " in x for x in left_out)
        if file.is_file():
            assert (files.folder / "found" / f"{file.name[:200]}.mask.png").is_file() == written, file


# --- trees: a dataset each ---


@pytest.mark.parametrize("odd", TREES, ids=lambda odd: odd.what)
def test_trees(odd: Tree, files: World, tmp_path: Path) -> None:
    """Checked, through stage one and two, scored, shown, and segmented."""
    splits = DATASET["splits"] | {"train": DATASET["splits"]["train"] | odd.split}  # type: ignore[index, operator]
    world = plain(tmp_path, DATASET | odd.settings | {"splits": splits})
    for name in ("tiny-vit.json", "tiny-vit.safetensors"):
        (tmp_path / name).symlink_to(files.folder / name)
    odd.make(world.data / "odd")
    bad = odd.verdict in ("named", "refused")
    output, _ = done(world, "datasets", "check", "odd.yaml", code=2 if bad else 0)
    assert len(said(odd, lines(output, "fault"))) == bad and len(lines(output, "fault")) == bad
    assert len(said(odd, lines(output, "warning"))) == len(lines(output, "warning")) == (odd.verdict == "warned")
    command = ("precompute", "--config", "experiment.yaml", "--cache", "caches/odd", "--device", "cpu")
    evaluate = ("evaluate", "--run", files.folder / "runs" / "odd", "--dataset", "odd.yaml", "--device", "cpu",
                "--set", "evaluate.split=train")  # fmt: skip
    for verb in (command, evaluate):
        _, errors = done(world, *verb, code=2 if bad else 0)
        assert not bad or said(odd, lines(errors, "error"))
    if odd.verdict == "named":
        assert "1 images were skipped" in done(world, *command, "--on-error", "skip")[1]
    code = 2 if odd.verdict == "refused" else 0
    done(world, "inspect-pseudolabels", "--cache", "caches/odd", "--terminal", code=code)
    done(world, "inspect-pseudolabels", "--cache", "caches/odd", "--output", "gallery", code=code)
    train = ("train", "--config", "experiment.yaml", "--cache", "caches/odd", "--run", "runs/odd", "--device", "cpu")
    done(world, *train, code=code)
    if (world.data / "odd" / "photos").is_dir():
        before = len(list((world.data / "odd" / "photos").glob("train-[0-9].jpg")))
        done(world, "predict", "data/odd/photos", "--run", files.folder / "runs" / "odd", "--compare")
        assert len(list((world.folder / "predictions").glob("*.compare.png"))) >= before


# --- settings and words ---


@pytest.mark.parametrize("odd", SETTINGS, ids=lambda odd: odd.what)
def test_settings(odd: Settings, files: World) -> None:
    """The first verb that reads them refuses, whichever it is."""
    keys = yaml.safe_load(odd.yaml.splitlines()[0]) if odd.yaml else {}
    settings = {key: value for key, value in DATASET.items() if key not in keys} | odd.changes
    if "classes" in keys or "classes" in odd.changes:
        settings.pop("unseen", None)
    path = files.folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings) + odd.yaml + "\n")
    for verb in (
        ("datasets", "check", path), ("precompute", "--dataset", path),
        ("train", "--cache", "caches/odd", "--dataset", path), ("evaluate", "--run", "runs/odd", "--dataset", path),
        ("inspect-pseudolabels", "--dataset", path),
    ):  # fmt: skip
        _, errors = done(files, *verb, code=2)
        file = odd.changes["classes"] if "class names" in odd.says else "settings.yaml"
        assert said(odd, lines(errors, "error"), file), (verb, errors)


@pytest.mark.parametrize("odd", WORDS, ids=lambda odd: odd.what)
def test_words(odd: Words, files: World) -> None:
    (files.folder / "words.txt").write_bytes(odd.file)
    photo = files.data / "odd" / "photos" / "train-0.jpg"
    arguments = ("predict", photo, "--run", "runs/odd", "--classes", odd.words, "--output", "worded")
    _, errors = done(files, *arguments, code=0 if odd.verdict == "read" else 2)
    assert odd.verdict == "read" or said(odd, lines(errors, "error"))


# --- the list ---


def test_the_page_shows_the_list() -> None:
    from tests.odd.inputs import table

    page = (ROOT / "docs" / "datasets.md").read_text()
    assert f"\n{table()}\n" in page, "put tests.odd.inputs.table() into docs/datasets.md"
    assert all(f"**{verdict}**: {meaning}" in " ".join(page.split()) for verdict, meaning in VERDICTS.items())


def test_the_list_is_long() -> None:
    assert len(ALL) >= 60 and len({odd.what for odd in ALL}) == len(ALL)
    assert {odd.verdict for odd in ALL} == set(VERDICTS)
