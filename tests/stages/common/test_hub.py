"""Runs on the Hugging Face hub: from its cache on disk, and from a server that speaks what a download needs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from configs.errors import UserError
from configs.load import resolve
from pipeline.student.student import Student
from stages.apply.predict import Segmenter
from stages.common.runs import CONFIG, load_run
from tests.conftest import ROOT, World
from tests.hub import put, serve

SHA = "0" * 40
NAME = "hf-hub:org/one"


@pytest.fixture
def published(offline: Path, trained: Path) -> Path:
    """The run `trained` in the hub's cache, with files that are never asked for."""
    files = {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file() and path.name[0] != "."}
    put(offline, "org/one", {**files, "handler.py": b"raise SystemExit"})
    return offline


def test_a_run_in_the_hubs_cache_is_used_as_a_folder_is(world: World, trained: Path, published: Path) -> None:
    scores = []
    for run in (trained, NAME):
        world.run("evaluate", "--run", run, "--json", "scores.json")
        scores.append(json.loads((world.folder / "scores.json").read_text()))
    assert {**scores[0], "of": NAME} == {**scores[1], "of": NAME}
    photo = np.random.default_rng(0).integers(0, 256, (70, 64, 3), np.uint8)
    own, other = (Segmenter.load(run)(photo, None) for run in (trained, NAME))
    assert np.array_equal(own, other)
    world.run("predict", world.data / "tiny" / "images" / "val-0.png", "--run", NAME, "--output", "from-the-hub")
    assert (world.folder / "from-the-hub" / "val-0.png.mask.png").is_file()


def as_a_user(world: World, address: str, home: Path, *command: str | Path, offline: bool = False) -> str:
    """What a command prints, in a process of its own: huggingface_hub reads its environment when it is imported."""
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *map(str, command)],
        cwd=world.folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_is_downloaded_once(world: World, trained: Path, tmp_path: Path) -> None:
    """Only the two files that a run needs; what else is there is left there."""
    folder = shutil.copytree(trained, tmp_path / "published")
    (folder / "handler.py").write_text("raise SystemExit")
    with serve({"models/org/one": folder}) as (address, asked):
        command = ("evaluate", "--run", NAME, "--json", "-")
        first = as_a_user(world, address, tmp_path, *command)
        assert first == as_a_user(world, address, tmp_path, *command, offline=True)
        assert json.loads(first)["miou"] >= 0 and set(asked) == {CONFIG, "student.safetensors"}


def test_a_cache_on_the_hub_is_a_cache_at_any_url(world: World, tmp_path: Path) -> None:
    with serve({"datasets/org/cache": world.folder / "caches" / "tiny"}) as (address, _):
        command = ("train", "--config", world.config, "--cache")
        as_a_user(world, address, tmp_path, *command, "hf://datasets/org/cache", "--run", tmp_path / "by-url")
    world.run(*command, "caches/tiny", "--run", tmp_path / "by-folder")
    own, other = (load_run(tmp_path / run).student.state_dict() for run in ("by-url", "by-folder"))
    assert all(torch.equal(own[name], other[name]) for name in own)


@pytest.mark.parametrize("name", ["hf-hub:org/other", "hf-hub:a/b/c", "hf-hub:../one"])
def test_what_is_not_there_is_one_line(world: World, published: Path, name: str) -> None:
    line = world.fails("evaluate", "--run", name)
    assert line.startswith("error: --run hf-hub:") and line.endswith("connect once, or give a local folder")
    with pytest.raises(UserError, match=r"^student\.weights hf-hub:.* or give a local folder$"):
        Student(resolve(config=world.config, assignments=[f"student.weights={name}"]).student, 16)


def test_a_run_on_the_hub_is_not_trained_in(world: World, published: Path) -> None:
    line = world.fails("train", "--cache", "caches/tiny", "--config", world.config, "--run", NAME)
    assert "set student.weights" in line and not (world.folder / NAME).exists()


def test_a_run_without_its_settings_is_refused(world: World, offline: Path, trained: Path) -> None:
    put(offline, "org/one", {"student.safetensors": (trained / "student.safetensors").read_bytes()})
    assert f"has no {CONFIG}" in world.fails("evaluate", "--run", NAME)


@pytest.mark.parametrize("source", ["folder", "hub"])
def test_a_student_starts_from_a_run(world: World, trained: Path, published: Path, tmp_path: Path, source: str) -> None:
    """Its encoder, head and spread are the run's; training changes them."""
    model = shutil.copytree(trained, tmp_path / "my-model", ignore=shutil.ignore_patterns("checkpoints"))
    weights = str(model) if source == "folder" else NAME
    config = resolve(config=world.config, assignments=[f"student.weights={weights}"])
    own, started = load_run(trained).student.state_dict(), Student(config.student, 16).state_dict()
    assert own.keys() == started.keys() and all(torch.equal(own[name], started[name]) for name in own)
    world.run(
        "train", "--cache", "caches/tiny", "--config", world.config, "--run", tmp_path / "run",
        "--set", f"student.weights={weights}",
    )  # fmt: skip
    trained_on = load_run(tmp_path / "run").student.state_dict()
    assert any(not torch.equal(own[name], trained_on[name]) for name in own)


def test_a_run_of_another_student_is_refused(world: World, trained: Path, tmp_path: Path) -> None:
    for assignment, width in (
        ("student.channels=24", 16),
        ("student.model=segformer-b0", 16),
        ("student.channels=16", 8),
    ):
        config = resolve(config=world.config, assignments=[f"student.weights={trained}", assignment])
        with pytest.raises(UserError, match=r"^student\.weights .*(shape|belong to another model)"):
            Student(config.student, width)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no file .*student\.safetensors"):
        Student(resolve(config=world.config, assignments=[f"student.weights={tmp_path / 'empty'}"]).student, 16)


def test_settings_from_a_stranger_run_no_code(world: World, offline: Path, trained: Path, tmp_path: Path) -> None:
    settings = (trained / CONFIG).read_text() + f"\nstudent: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n"
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(settings)
    put(offline, "org/one", {
        CONFIG: settings.encode(), "student.safetensors": (trained / "student.safetensors").read_bytes(),
    })  # fmt: skip
    assert "config.yaml is damaged" in world.fails("evaluate", "--run", NAME)
    assert not (tmp_path / "made").exists()
