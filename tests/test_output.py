"""Results go to files before they go to a screen, whatever the screen takes; a full disk names its file."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, World
from tests.stages.precompute.test_faults import disk_of

ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def start(world: World, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A shell's command, in which CLIP is the program, with stderr apart."""
    line = command.replace("CLIP", f"{sys.executable} {ROOT / 'cli.py'}")
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"], cwd=world.folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def accents(world: World, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A run with a class that ASCII has no letters for."""
    folder = tmp_path_factory.mktemp("accents")
    shutil.copytree(world.data, folder / "data")
    shutil.copytree(trained, folder / "runs" / "one")
    file = folder / "runs" / "one" / "config.yaml"
    settings = yaml.safe_load(file.read_text())
    settings["dataset"]["classes"][0] = "écran"
    file.write_text(yaml.safe_dump(settings))
    return World(folder)


@pytest.mark.parametrize(
    ("redirected", "code"),
    [("", 0), ("| head -c 1", 0), ("| true", 0), (">&-", 0), ("2>&-", 0), (">/dev/full", 2), ("2>/dev/full", 0),
     (">/dev/full 2>/dev/full", 2)],
)  # fmt: skip
def test_json_is_written_whatever_the_screen_takes(accents: World, redirected: str, code: int, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    done = start(accents, f"CLIP evaluate --set evaluate.gamma=0 --json {file} {redirected}", **ASCII)
    assert "écran" in json.loads(file.read_text())["iou"]
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    if redirected == ">/dev/full":
        assert "error: cannot write the results to stdout (No space left on device)" in done.stderr


def test_names_are_printed_as_well_as_the_terminal_can(accents: World) -> None:
    done = start(accents, "CLIP evaluate --set evaluate.gamma=0", **ASCII)
    assert done.returncode == 0 and r"\xe9cran" in done.stdout


@pytest.mark.slow
def test_files_are_utf8_in_any_locale(accents: World, tmp_path: Path) -> None:
    done = start(accents, f"CLIP export --output {tmp_path / 'model'}", **ASCII)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "model" / "model.json").read_text())["classes"][0] == "écran"


@pytest.mark.slow
def test_training_outlives_whoever_reads_its_news(world: World, tmp_path: Path) -> None:
    train = f"CLIP train --cache caches/tiny --config {world.config}"
    for number, redirected in enumerate(("2>&1 | true", "2>/dev/full", "2>&-")):
        done = start(world, f"{train} --run {tmp_path / str(number)} {redirected}")
        assert done.returncode == 0 and (tmp_path / str(number) / "student.safetensors").exists()


# --- A full disk ---


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that is full but for a few files' names."""
    with disk_of("16k", tmp_path / "disk", "-l") as folder:
        yield folder


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (["predict", "data/tiny/images/val-0.png", "--output", "DISK/found"], "found/val-0.png."),
        (["predict", "data/tiny/images/val-0.png", "--rle", "--output", "DISK/found"], "found/val-0.png."),
        (["inspect-pseudolabels", "--cache", "caches/tiny", "--output", "DISK/gallery"], ".gallery.partial/"),
        (["inspect-pseudolabels", "--cache", "caches/tiny", "--png", "DISK/sheet.png"], "sheet.png"),
        (["evaluate", "--run", "runs/one", "--json", "DISK/scores.json"], "scores.json"),
        (["train", "--cache", "caches/tiny", "--config", "tiny-experiment.yaml", "--run", "DISK/run"], "run/"),
        (["export", "--run", "runs/one", "--output", "DISK/model"], "model"),
    ],
)
def test_a_full_disk_names_the_file(world: World, trained: Path, disk: Path, command: list[str], file: str) -> None:
    (disk / "rest").write_bytes(bytes(12 * 1024))  # one page is left
    (disk / "more").write_bytes(bytes(4 * 1024))
    line = world.fails(*(text.replace("DISK", str(disk)) for text in command))
    assert f"cannot write {disk}/{file}" in line and "No space left on device" in line and "free some space" in line


def test_a_log_that_finds_no_room_names_itself(world: World, disk: Path) -> None:
    """Enough for the run's beginning, not for all lines."""
    (disk / "rest").write_bytes(bytes(4 * 1024))
    run = disk / "run"
    done = start(world, f"CLIP train --cache caches/tiny --config {world.config} --run {run} --set train.iterations=99")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"error: cannot write {run}/" in done.stderr or f"error: cannot save {run}/" in done.stderr
