"""Runs on the Hugging Face hub: from its cache on disk, and from a server that speaks what a download needs."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
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
from tests.pipeline.teacher.test_load import put

SHA = "0" * 40
NAME = "hf-hub:org/one"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def published(offline: Path, trained: Path) -> Path:
    """The run `trained` in the hub's cache, with files that are never asked for."""
    files = {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file() and path.name[0] != "."}
    put(offline, "org/one", {**files, "handler.py": b"raise SystemExit"})
    return offline


@pytest.fixture
def hub(trained: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub with the run `trained`, and the paths that were asked for."""
    files = {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file() and path.name[0] != "."}
    files["handler.py"] = b"raise SystemExit"
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            name = path.rpartition("/")[2]
            if path == "/api/models/org/one/revision/main":
                listed = [{"rfilename": name} for name in files]
                content = json.dumps({"id": "org/one", "sha": SHA, "siblings": listed}).encode()
            elif path == f"/api/models/org/one/tree/{SHA}":
                content = json.dumps(
                    [{"type": "file", "path": name, "size": len(files[name]), "oid": SHA} for name in files]
                ).encode()
            elif path == f"/org/one/resolve/{SHA}/{name}" and name in files:
                content = files[name]
                asked.append(name)
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", SHA)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


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


def test_a_run_is_downloaded_once(world: World, hub: tuple[str, list[str]], trained: Path, tmp_path: Path) -> None:
    """By the hub's own client; only the two files that a run needs."""
    address, asked = hub
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}
    command = [sys.executable, str(ROOT / "cli.py"), "evaluate", "--run", NAME, "--json", "-"]
    found = []
    for offline in ("0", "1"):
        done = subprocess.run(
            command, cwd=world.folder, env={**environment, "HF_HUB_OFFLINE": offline}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0] == found[1] and set(asked) == {CONFIG, "student.safetensors"}


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
