"""A world small enough for tests: a few rendered scenes, a random CLIP, a random student, and their settings."""

import json
import os
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from unittest import mock

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import yaml
from dask.distributed import LocalCluster
from PIL import Image
from safetensors.torch import save_file

os.environ["COLUMNS"] = "200"  # before Rich looks: lines and tables are not wrapped
ROOT = Path(__file__).parent.parent
SIZE = 64
SPLITS = {"train": 10, "holdout": 4, "val": 4}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a cache below it; the time that a run took is no part of one."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "timing.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@dataclass(frozen=True)
class World:
    """Paths below one temporary folder, which is also the working directory of the commands."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def config(self) -> Path:
        return self.folder / "tiny-experiment.yaml"

    def run(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`clip-zss ...` in the world's folder, as a user would, but in this process: its workers are threads.

        It takes a second where `spawn` takes ten, most of them for imports.
        """
        import cli
        import stages.precompute.workers

        command = ["clip-zss", *(["--debug"] if check else []), *map(str, arguments)]
        threads = partial(LocalCluster, processes=False)
        out, err, code = StringIO(), StringIO(), 0
        with (
            chdir(self.folder), redirect_stdout(out), redirect_stderr(err),
            mock.patch.object(sys, "argv", command),
            mock.patch.object(stages.precompute.workers, "LocalCluster", threads),
        ):  # fmt: skip
            try:
                cli.main()
            except SystemExit as done:
                code = int(done.code or 0)
        assert not check or code == 0, err.getvalue()
        return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())

    def spawn(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """`python cli.py ...` in the world's folder, in processes of its own; it must succeed."""
        command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    def fails(self, *arguments: str | Path) -> str:
        """A user's mistake: exit code 2 and one line on stderr, which is returned."""
        done = self.run(*arguments, check=False)
        assert done.returncode == 2, (done.returncode, done.stderr)
        assert "Traceback" not in done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, done.stderr
        return lines[0]


def write_world(folder: Path) -> World:
    """Dataset `tiny`, a random teacher, and the experiment that joins them."""
    from pipeline.data.scenes import CLASSES, render_scene

    world = World(folder)
    root = world.data / "tiny"
    for name in ("images", "masks", "splits"):
        (root / name).mkdir(parents=True)
    for stream, (split, count) in enumerate(SPLITS.items()):
        ids = [f"{split}-{index}" for index in range(count)]
        for index, image_id in enumerate(ids):
            image, mask = render_scene(np.random.default_rng([stream, index]), SIZE)
            if image_id == "train-3":
                mask[:] = 0  # a seen class everywhere: no unannotated token
            Image.fromarray(image).save(root / "images" / f"{image_id}.png")
            Image.fromarray(mask).save(root / "masks" / f"{image_id}.png")
        (root / "splits" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    files = {"images": "images/{id}.png", "masks": "masks/{id}.png"}
    dataset = {
        "name": "tiny",
        "root": "tiny",
        "splits": {s: {**files, "ids": f"splits/{s}.txt", "count": n} for s, n in SPLITS.items()},
        "classes": list(CLASSES),
        "unseen": ["heart", "ring", "arrow", "dots", "bricks", "clouds"],
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(dataset))
    write_teacher(folder)
    experiment = {
        "dataset": str(folder / "tiny.yaml"),
        "teacher": {"model": str(folder / "tiny-vit.json"), "pretrained": str(folder / "tiny-vit.safetensors")},
        "views": {"size": SIZE, "count": 1, "crop": "whole"},
        "storage": {"shard_images": 4, "dense_tokens": "float16"},
        "precompute": {"batch_size": 3},
        "student": {"model": "timm:tf_efficientnet_lite0", "weights": "none", "channels": 16},
        "loss": {"label_stride": 2, "bank": 2},
        "train": {
            "iterations": 4, "batch_size": 4, "lr": 1e-3, "warmup": 1, "workers": 0,
            "validate_every": 4, "validate_on": "holdout",
        },
        "evaluate": {"gamma": "auto"},
    }  # fmt: skip
    world.config.write_text(yaml.safe_dump(experiment))
    return world


def write_teacher(folder: Path) -> None:
    """tiny-vit.json and .safetensors: a random CLIP of width 16."""
    from open_clip.model import CLIP

    vision = {"image_size": SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    model = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (folder / "tiny-vit.json").write_text(json.dumps(model))
    torch.manual_seed(0)
    state = {name: tensor.contiguous() for name, tensor in CLIP(**model).state_dict().items()}
    save_file(state, folder / "tiny-vit.safetensors")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The untouched world; its cache is at `caches/tiny`. Tests that break things take a `copy_of` it."""
    made = write_world(tmp_path_factory.mktemp("world"))
    made.run("precompute", "--config", made.config, "--cache", "caches/tiny")
    return made


@pytest.fixture(scope="session")
def trained(world: World) -> Path:
    """A run of the world."""
    world.run("train", "--cache", "caches/tiny", "--config", world.config, "--run", "runs/one", "--seed", "3")
    return world.folder / "runs" / "one"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network and an empty Hugging Face cache, as HF_HUB_OFFLINE=1 and HF_HUB_CACHE make them."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache
