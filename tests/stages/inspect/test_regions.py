"""The contact sheet of pseudo labels."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import stages.inspect.regions
from cache.reader import open_cache
from configs.load import resolve
from pipeline.data.dataset import IGNORE, SegmentationDataset
from stages.inspect.regions import choose_rows, sheet
from tests.conftest import SIZE, World


def test_the_legend_names_what_the_masks_hold(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[int, str]] = []
    make = stages.inspect.regions.legend
    monkeypatch.setattr(stages.inspect.regions, "legend", lambda names: told.append(dict(names)) or make(names))
    config, cache = resolve(config=world.config), open_cache(world.folder / "caches" / "tiny")
    dataset = SegmentationDataset(config.dataset, world.data, "train")
    rows = choose_rows(cache, [], 3, seed=1)
    picture = Image.open(sheet(config, cache, world.data, rows, tmp_path / "new" / "sheet.png"))
    classes = sorted({int(value) for row in rows for value in np.unique(dataset.mask(row))} - {IGNORE})
    assert 1 < len(classes) < len(dataset.config.classes)
    stars = {name: f"{name}*" for name in dataset.config.unseen}
    assert told == [{index: stars.get(name := dataset.config.classes[index], name) for index in classes}]
    assert picture.height > 3 * 192 and picture.width > 5 * 192 and SIZE < 192


def test_masks_without_a_class_need_no_legend(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SegmentationDataset, "mask", lambda *_: np.full((SIZE, SIZE), IGNORE, np.uint8))
    config, cache = resolve(config=world.config), open_cache(world.folder / "caches" / "tiny")
    assert sheet(config, cache, world.data, [0], tmp_path / "sheet.png").is_file()
