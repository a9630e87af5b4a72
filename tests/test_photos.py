"""benchmarks/photos.py: its teacher is one that the pipeline takes, and its rows are settings."""

import runpy
from pathlib import Path
from unittest import mock

import pytest
import torch

from configs.ablation import read_ablation
from configs.dataset import Dataset
from configs.load import dataset_settings, resolve
from configs.schema import Teacher
from pipeline.teacher.clip import FrozenClip
from tests.conftest import ROOT

DATA = ROOT.parent / "shared" / "data" / "msrc"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return runpy.run_path(str(ROOT / "benchmarks" / "photos.py"))


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the photos of MSRC in ../shared/data/msrc")
def test_its_teacher_is_a_teacher(script: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[type-arg]
    """Made from a few photos: which words it knows is not asked here."""
    import photos_teacher

    monkeypatch.chdir(tmp_path)
    dataset_file = script["write_dataset"](DATA, "second")
    assert resolve(str(dataset_file)).dataset.unseen == script["SPLITS"]["second"]
    dataset = Dataset.model_validate({**dataset_settings(str(dataset_file)), "limit": 4})
    with mock.patch.multiple(photos_teacher, CROPS=2, STEPS=5, BATCH=4):
        model, weights, precision = photos_teacher.make_teacher(dataset, DATA, tmp_path / "teacher")
    assert 0 < precision <= 100
    clip = FrozenClip(Teacher(model=str(model), pretrained=str(weights), dense="plain"))
    cls_token, dense_tokens = clip.encode(torch.randn(2, 3, 64, 96))
    assert cls_token.shape == (2, 512) and dense_tokens.shape == (2, 2, 3, 512)
    torch.testing.assert_close(dense_tokens.mean(dim=(1, 2)), cls_token)  # a linear layer after a mean over places


def test_its_rows_are_settings(script: dict) -> None:  # type: ignore[type-arg]
    rows = read_ablation("local")[1].rows
    assert {script["PAPER"], script["OURS"]} <= rows.keys()
    for own in rows.values():
        config = resolve(config=ROOT / "benchmarks" / "photos.yaml", assignments=own)
        assert config.views.size == 192 and config.evaluate.gamma == "auto"
    assert all(len(set(unseen)) == 5 for unseen in script["SPLITS"].values())
