"""`demo` on a few scenes: its table and pictures, and what is done again and what is not."""

import re
from pathlib import Path
from unittest import mock

import pytest

import pipeline.data.scenes
from tests.conftest import World

SETTINGS = [
    f"--set={setting}" for setting in (
        "student.model=timm:test_efficientnet", "student.weights=none", "student.channels=16", "train.iterations=2",
        "train.batch_size=4", "train.warmup=1", "train.validate_every=2", "loss.label_stride=8",
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("demo"))
    with mock.patch.dict(pipeline.data.scenes.SPLITS, {"train": 8, "holdout": 3, "val": 3}):
        world.run("demo", "--seeds", "0,1", *SETTINGS)
    return world


def logs(world: World) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in (world.folder / "runs").glob("*/log.jsonl")}


def test_table_and_pictures(shown: World) -> None:
    text = (shown.folder / "demo" / "scenes.md").read_text()
    assert len(re.findall(r"^\| student \| [01] ", text, re.MULTILINE)) == 4  # scores, and IoU of unseen classes
    assert re.search(r"`clip-zss demo --seeds 0,1 --set [^`]*`, [0-9.]+ minutes, on", text)
    assert {path.name for path in (shown.folder / "demo").iterdir()} == {
        "scenes.md", "predictions.png", "pseudo-labels.png",
    }  # fmt: skip


def test_the_same_command_goes_on(shown: World) -> None:
    before = logs(shown)
    assert len(before) == 4
    shown.run("demo", "--seeds", "1", "--output", "a[b]gain", *SETTINGS)
    assert logs(shown) == before
    assert "before that 2 of 2 trainings" in (shown.folder / "a[b]gain" / "scenes.md").read_text()


def test_mistakes_are_found_before_anything_is_made(tmp_path: Path) -> None:
    world = World(tmp_path)
    for seeds in ("0,x", "0,-1"):
        assert "seed" in world.fails("demo", "--seeds", seeds)
    assert list(tmp_path.iterdir()) == []
