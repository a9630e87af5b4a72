"""`export`: what is taken away says what the student says, in programs that know nothing of this package."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from unittest import mock

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from configs.errors import UserError
from configs.load import resolve
from configs.schema import Student as StudentConfig
from pipeline.data.photos import read_photo
from pipeline.data.scenes import render_scene
from pipeline.metrics import seen_margins
from pipeline.student.portable import Portable
from pipeline.student.student import Student
from stages.apply.export import export
from stages.apply.predict import Segmenter
from stages.apply.predictor import student_predictor
from stages.common.runs import Run, load_run
from tests.conftest import World


@pytest.fixture(scope="module")
def exported(world: World, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "taken away"
    done = world.run("export", "--run", trained, "--output", folder)
    assert "model.onnx: within" in done.stdout and "model.pt2: within" in done.stdout
    return folder


def onnx(folder: Path, image: np.ndarray, features: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    return np.asarray(session.run(None, {"image": image, "text_features": features})[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "rows", "columns", "classes"), [(1, 64, 64, 1), (2, 96, 224, 7), (1, 127, 127, 3), (2, 33, 250, 20)]
)
def test_onnx_equals_the_student_at_any_size_and_words(
    exported: Path, trained: Path, batch: int, rows: int, columns: int, classes: int
) -> None:
    rng = np.random.default_rng(rows)
    image = rng.integers(0, 256, (batch, rows, columns, 3), np.uint8)
    features = rng.standard_normal((classes, 16)).astype(np.float32)
    student = load_run(trained).student
    mean, std = (np.array(values, np.float32) for values in (student.mean, student.std))
    pixels = torch.from_numpy(((image / np.float32(255) - mean) / std).transpose(0, 3, 1, 2))
    deviations = np.array([(word @ student.spread.numpy() @ word) ** 0.5 for word in features.astype(np.float64)])
    assert deviations.min() > 0
    with torch.no_grad():  # R . T by its definition, less the word's spread
        logits = torch.einsum("bchw,kc->bkhw", student(pixels), torch.from_numpy(features))
        logits -= torch.from_numpy(deviations.astype(np.float32))[:, None, None]
        wanted = torch.nn.functional.interpolate(logits, scale_factor=4, mode="bilinear").numpy()[..., :rows, :columns]
    assert np.abs(onnx(exported, image, features) - wanted).max() <= 1e-4 * max(1, np.abs(wanted).max())


@pytest.mark.parametrize("own", [True, False])
def test_the_cards_program_equals_the_segmenter(exported: Path, trained: Path, tmp_path: Path, own: bool) -> None:
    """On a photo of a camera on its side, at the run's own gamma, and one at which half of the pixels change sides."""
    card = (exported / "README.md").read_text()
    assert not re.search(r"\$\w", card) and "heart" in card
    here = shutil.copytree(exported, tmp_path / "here")
    photo = Image.fromarray(render_scene(np.random.default_rng(0), 130)[0]).crop((0, 0, 130, 100))
    exif = photo.getexif()
    exif[0x0112] = 6  # Orientation: to be turned by 90 degrees
    photo.save(here / "photo.jpg", exif=exif, quality=95)

    run = load_run(trained)
    logits = student_predictor(run.student, run.text_features, run.config)(read_photo(here / "photo.jpg"))
    margins = seen_margins(logits, run.config.dataset.seen_indices, run.config.dataset.unseen_indices)
    gamma = None if own else float(np.median(margins))
    if gamma is not None:
        described = json.loads((here / "model.json").read_text())
        (here / "model.json").write_text(json.dumps(described | {"gamma": gamma}))
    code = card.split("```python\n")[1].split("```")[0] + "np.save('mask.npy', mask)"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    mask, wanted = np.load(here / "mask.npy"), Segmenter(run, gamma)(here / "photo.jpg")
    assert mask.shape == wanted.shape == (130, 100)
    share = 0.001  # two programs' last bits differ
    assert (mask != wanted).mean() < share
    assert (Segmenter(run, 0.0)(here / "photo.jpg") != wanted).mean() > 10 * share


def test_the_folder_is_a_run(exported: Path, trained: Path) -> None:
    image = np.random.default_rng(1).integers(0, 256, (80, 100, 3), np.uint8)
    assert np.array_equal(Segmenter.load(exported, "cpu")(image), Segmenter.load(trained, "cpu")(image))
    described = json.loads((exported / "model.json").read_text())
    assert described["classes"][0] == "circle" and described["iteration"] == 4
    run = load_run(trained)
    assert described["gamma"] == run.gamma == load_run(exported).gamma == Segmenter.load(exported, "cpu").gamma != 0
    assert f"here {run.gamma:.4g}" in (exported / "README.md").read_text()
    weights = (exported / "student.safetensors").read_bytes()
    assert weights == (trained / "student.safetensors").read_bytes()
    features = np.load(exported / "text_features.npy")
    assert np.array_equal(features, load_run(trained).text_features.numpy())


@pytest.mark.slow
def test_half_precision_is_checked_and_half_the_size(
    world: World, exported: Path, trained: Path, tmp_path: Path
) -> None:
    world.run("export", "--run", trained, "--output", tmp_path / "half", "--precision", "fp16")
    small, large = ((folder / "model.onnx").stat().st_size for folder in (tmp_path / "half", exported))
    assert small < 0.6 * large
    image = np.random.default_rng(2).integers(0, 256, (1, 64, 96, 3), np.uint8)
    features = np.load(exported / "text_features.npy")
    whole, half = onnx(exported, image, features), onnx(tmp_path / "half", image, features)
    assert half.dtype == np.float32 and 0 < np.abs(half - whole).max() < 0.05 * np.abs(whole).max()


@pytest.mark.slow
def test_a_program_that_differs_is_not_put_in_place(trained: Path, tmp_path: Path) -> None:
    run = load_run(trained)
    forward = Portable.forward
    seen: list[int] = []

    def drifting(self: Portable, image: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        seen.append(0)  # what is exported comes first
        return forward(self, image, text_features) + (0.1 if len(seen) == 1 else 0.0)

    with mock.patch.object(Portable, "forward", drifting), pytest.raises(UserError, match="differs from the student"):
        export(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_mistakes_are_one_line(world: World, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "not empty" in world.fails("export", "--run", trained, "--output", tmp_path / "full")
    with mock.patch.dict(sys.modules, {"onnxruntime": None}):
        assert "'.[export]'" in world.fails("export", "--run", trained, "--output", tmp_path / "new")
    assert "has no config.yaml" in world.fails("export", "--run", tmp_path, "--output", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["segnext-t", "swin-t"])
def test_families(model: str, tmp_path: Path) -> None:
    config = resolve("scenes", assignments=[f"student.model={model}", "student.weights=none", "views.size=64"])
    torch.manual_seed(0)
    student = Student(StudentConfig(model=model, weights="none"), 16).eval()
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "student.safetensors"):
        (tmp_path / "run" / name).touch()
    run = Run(tmp_path / "run", config, student, torch.eye(20, 16), 0)
    (tmp_path / "out").mkdir()
    with chdir(tmp_path / "out"):
        assert max(export(run, Path(".")).values()) < 1e-4
        assert Path("model.onnx").is_file()  # the working folder is still that one
    described = json.loads((tmp_path / "out" / "model.json").read_text())
    assert (described["smallest"] == described["largest"]) == model.startswith("swin")
