"""Every experiment in configs/experiments/ with --runlocal: both stages and the evaluation, on small official trees."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cli import app
from configs.load import resolve
from configs.schema import CONFIGS
from pipeline.data.dataset import SegmentationDataset

EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiments").glob("*.yaml"))


def experiment(name: str) -> Path:
    return CONFIGS / "experiments" / f"{name}.yaml"


def write_official(root: Path, name: str) -> None:
    """Eight images for each split of a built-in dataset, where its YAML says."""
    config, rng = resolve(name).dataset, np.random.default_rng(0)
    values = [*config.value_of_class(None), config.ignore_index[-1]]
    for split, files in config.splits.items():
        ids = [f"{split}_{index}" for index in range(8)]
        for image_id in ids:
            shape = tuple(rng.integers(60, 100, 2))
            image = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
            mask = np.repeat(np.repeat(rng.choice(values, (4, 4)), 25, 0), 25, 1)[: shape[0], : shape[1]]
            for pattern, content in ((files.images, image), (files.masks[0].files, mask.astype(np.uint8))):
                path = root / config.root / pattern.replace("{id}", image_id)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(content).save(path)
        for index, listing in enumerate(files.ids):
            path = root / config.root / listing
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(ids[index :: len(files.ids)]) + "\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name in ("pascal-voc", "pascal-context", "coco-stuff"):
        write_official(root, name)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches and runs: experiments that share stage one share its cache."""
    return tmp_path_factory.mktemp("work")


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_runlocal(name: str, data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of experiments with one student the first has it; the others, to save minutes, the smallest."""
    monkeypatch.chdir(folder)
    torch.set_num_threads(1)
    student = resolve(config=experiment(name)).student.model
    first = next(other for other in EXPERIMENTS if resolve(config=experiment(other)).student.model == student)
    smallest = [] if name == first else ["--set", "student.model=segformer-b0"]
    common = ["--config", str(experiment(name)), "--data-root", str(data), "--runlocal"]
    run = folder / "runs" / name
    for verb in (["precompute"], ["train", "--run", str(run), *smallest], ["evaluate", "--run", str(run), *smallest]):
        done = CliRunner().invoke(app, [*verb, *common])
        assert done.exit_code == 0, (verb, done.output, done.exception)
    assert "mIoU" in done.output
    assert len((run / "log.jsonl").read_text().splitlines()) == 6
    (run / "student.safetensors").unlink()


def test_limit(data: Path) -> None:
    """The first images of a split, which is then as large as it should be."""
    config = resolve("pascal-voc", assignments=["dataset.limit=3"]).dataset
    dataset = SegmentationDataset(config, data, "val")
    assert dataset.ids == ["val_0", "val_1", "val_2"] and dataset.expected == 3


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_full_size(name: str) -> None:
    """An experiment differs from its --runlocal in size alone."""
    full, local = resolve(config=experiment(name)), resolve(config=experiment(name), runlocal=True)
    assert full.dataset.limit is None and local.dataset.limit == 6
    assert local.student.model == full.student.model and local.loss == full.loss and local.student.weights == "none"
    assert full.train.iterations >= 400 and local.train.iterations == 6
    assert (full.evaluate.gamma == "auto") == (name == "scenes")  # the paper's are numbers


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_validations_are_few(name: str) -> None:
    schedule = resolve(config=experiment(name)).train
    assert 1 <= schedule.iterations / schedule.validate_every <= 5
