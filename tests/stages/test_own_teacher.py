"""Teachers that are not open_clip's go through every verb: the plug-in of docs/teachers.md, and one of transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_model

from cache.reader import open_cache
from tests.conftest import ROOT, World, write_world
from tests.markdown import blocks
from tests.pipeline.teacher.dual_encoders import write_dual_encoder

PAGE = ROOT / "docs" / "teachers.md"


def plug_in() -> tuple[str, str]:
    """pyproject.toml and my_teacher.py, as the page shows them."""
    (project,) = [block.text for block in blocks(PAGE) if block.language == "toml"]
    (module,) = [block.text for block in blocks(PAGE) if "class MyClip" in block.text]
    return project, module


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("own"))


def test_the_plug_in_is_short() -> None:
    project, module = plug_in()
    assert len(project.splitlines()) + len([line for line in module.splitlines() if line]) <= 40


def every_verb(own: World, name: str, spawn: bool, *teacher: str) -> None:
    """Precompute, train, evaluate the student and the teacher, predict with new words; a live teacher too."""
    cache, run = f"caches/{name}", f"runs/{name}"
    settings = ["--config", str(own.config), *(part for value in teacher for part in ("--set", value))]
    (own.spawn if spawn else own.run)("precompute", *settings, "--cache", cache)
    made = open_cache(own.folder / cache)
    assert "nothing to do" in own.run("precompute", *settings, "--cache", cache).stderr
    assert made.manifest.settings["teacher"]["model"] == teacher[0].partition("=")[2]
    own.run("train", "--cache", cache, *settings, "--run", run)
    own.run("train", "--cache", cache, *settings, "--run", f"{run}-online", "--set", "train.teacher=online")
    own.run("evaluate", "--run", run, "--json", "scores.json")
    assert 0 <= json.loads((own.folder / "scores.json").read_text())["pixel_accuracy"] <= 100
    own.run("evaluate", "--teacher-dense", *settings, "--set", "evaluate.gamma=0")
    photo = "data/tiny/images/val-0.png"
    own.run("predict", photo, "--run", run, "--classes", "red moon|sun,lake", "--output", f"found-{name}")
    (mask,) = (own.folder / f"found-{name}").glob("*.mask.png")
    assert set(Image.open(mask).getdata()) <= {0, 1}


@pytest.mark.slow
def test_an_installed_plug_in(own: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built and installed by pip; stage one runs in processes of its own, which must find it too."""
    source, installed = own.folder / "my-teacher", own.folder / "installed"
    source.mkdir()
    for name, text in zip(("pyproject.toml", "my_teacher.py"), plug_in(), strict=True):
        (source / name).write_text(text)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(installed), str(source)], check=True)
    assert {path.name for path in installed.iterdir()} >= {"my_teacher.py", "my_teacher-1.0.dist-info"}
    monkeypatch.syspath_prepend(installed)
    monkeypatch.setenv("PYTHONPATH", f"{installed}")
    from my_teacher import Towers

    weights, size = own.folder / "my-clip.safetensors", "views.size=128"
    settings = ["teacher.model=my-clip", "teacher.pretrained=my-clip.safetensors", size]
    torch.manual_seed(0)
    save_model(Towers(), str(weights))
    every_verb(own, "mine", True, *settings)
    made = open_cache(own.folder / "caches" / "mine")
    assert made.manifest.settings["files"]["model"] == "my-clip"
    assert made.load("cls_tokens").shape == (10, 1, 64)

    save_model(Towers(), str(weights))  # other weights, another cache
    arguments = [part for value in settings for part in ("--set", value)]
    assert "files.pretrained" in own.fails("precompute", "--config", own.config, *arguments, "--cache", "caches/mine")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry) != installed])
    assert "unknown teacher.model 'my-clip'" in own.fails(
        "predict", "data/tiny/images", "--run", "runs/mine", "--classes", "newt"
    )


def test_a_dual_encoder_of_transformers(own: World) -> None:
    write_dual_encoder(own.folder / "siglip2", "siglip2")
    every_verb(own, "siglip2", False, "teacher.model=transformers", "teacher.pretrained=siglip2")
