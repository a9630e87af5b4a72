"""Stage one through the front door: what it stores is right, and no kill or mistake leaves anything to trust."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cache.layout import MANIFEST, copy_key, record_key
from cache.reader import open_cache
from configs.load import resolve
from configs.schema import Config
from pipeline.data.dataset import SegmentationDataset
from pipeline.data.views import normalise, replay
from pipeline.pseudo_labels import pseudo_labels
from pipeline.pseudo_labels.regions import region_tokens
from pipeline.teacher.clip import FrozenClip
from tests import reference
from tests.conftest import ROOT, SIZE, World, tree


@pytest.fixture(scope="module")
def config(world: World) -> Config:
    return resolve(config=world.config)


@pytest.fixture
def copy(world: World, tmp_path: Path) -> World:
    """A world of one's own, to break."""
    shutil.copytree(world.folder, tmp_path / "world")
    return World(tmp_path / "world")


def test_shapes_ids_and_manifest(world: World, config: Config) -> None:
    cache = open_cache(world.folder / "caches" / "tiny")
    assert cache.image_ids == [f"train-{index}" for index in range(10)]
    assert cache.manifest.settings["dataset"]["name"] == "tiny"
    assert cache.manifest.settings["pseudo_labels"]["lambda"] == 0.8
    assert {"dataset", "model", "pretrained"} == set(cache.manifest.settings["files"])
    shapes = {name: (cache.load(name).shape, cache.load(name).dtype.name) for name in cache.manifest.arrays}
    assert shapes == {
        "cls_tokens": ((10, 1, 16), "float16"),
        "dense_tokens": ((10, 1, 8, 8, 16), "float16"),
        "pseudo_labels": ((10, 1, 8, 8), "uint8"),
        "kmeans_labels": ((10, 1, 8, 8), "uint8"),
        "region_tokens": ((10, 1, 5, 16), "int8"),
        "views": ((10, 1, 5), "float32"),
    }


def test_contents_equal_teacher_and_reference(world: World, config: Config) -> None:
    """CLS and dense tokens are the teacher's; labels are those of the slow reference on the same tokens."""
    cache = open_cache(world.folder / "caches" / "tiny")
    dataset = SegmentationDataset(config.dataset, world.data, "train")
    teacher = FrozenClip(config.teacher)
    for row in range(len(dataset)):
        image, seen = dataset.training_pair(row)
        cls_token, dense = teacher.encode(normalise(image[None], teacher.mean, teacher.std))
        np.testing.assert_allclose(cache.read("cls_tokens", row)[0], cls_token[0].numpy(), atol=2e-3, rtol=1e-3)
        np.testing.assert_allclose(cache.read("dense_tokens", row)[0], dense[0].numpy(), atol=2e-3, rtol=1e-3)
        free = reference.unannotated_tokens(seen, 8)
        clusters, groups = reference.pseudo_labels(
            dense[0].numpy(), free, config.pseudo_labels.windows, config.pseudo_labels.iterations, 0.8
        )
        np.testing.assert_array_equal(cache.read("pseudo_labels", row)[0], groups)
        np.testing.assert_array_equal(cache.read("kmeans_labels", row)[0], clusters)
        regions = reference.region_tokens(dense.numpy(), groups[None], 5)[0]
        np.testing.assert_allclose(cache.read("region_tokens", row, 0), regions, atol=1)
        assert regions.any() == (groups < 255).any()
    features = teacher.text_features([names for _, names in config.dataset.channels], config.dataset.templates)
    torch.testing.assert_close(torch.from_numpy(cache.text_features), features)


def test_random_views_are_recorded_and_seen_by_the_teacher(copy: World, config: Config) -> None:
    """Three crops of each image: the cache holds what the teacher says of each replayed view, padded or not.

    The third is added to a cache of two, whose files are not written again; asking for fewer changes nothing.
    """
    settings = ("--set=views.crop=random", "--set=storage.dense_views=2")
    crops = ("precompute", "--config", copy.config, "--cache", "caches/crops", *settings)
    copy.run(*crops, "--set=views.count=2")
    first = {path: path.stat().st_ino for path in (copy.folder / "caches" / "crops").glob("arrays/*/c.?.?.*")}
    copy.run(*crops, "--set=views.count=3")
    assert len(first) == 6 * 3 * 2 and first == {path: path.stat().st_ino for path in first}
    assert "nothing to do" in copy.run(*crops, "--set=views.count=1").stderr
    cache = open_cache(copy.folder / "caches" / "crops")
    assert cache.load("dense_tokens").shape[:2] == (10, 2)
    views = cache.load("views")
    assert views.shape == (10, 3, 5)
    assert len(np.unique(views.reshape(30, 5), axis=0)) > 25
    assert (views[..., 2:4] > 1.01).any() and (views[..., 2:4] < 0.99).any() and set(views[..., 4].ravel()) == {0, 1}
    dataset = SegmentationDataset(config.dataset, copy.data, "train")
    teacher = FrozenClip(config.teacher)
    mean = tuple(round(255 * part) for part in teacher.mean)
    for row in (0, 3, 9):
        image, seen = dataset.training_pair(row)
        for index, view in enumerate(views[row]):
            shown = replay(view, image, SIZE, mean)
            cls_token, dense = teacher.encode(normalise(shown[None], teacher.mean, teacher.std))
            np.testing.assert_allclose(cache.read("cls_tokens", row)[index], cls_token[0].numpy(), atol=2e-3, rtol=1e-3)
            inside = replay(view, np.ones((SIZE, SIZE), np.uint8), SIZE, 0) == 1
            free = reference.unannotated_tokens(replay(view, seen, SIZE), 8, inside)
            np.testing.assert_array_equal(cache.read("pseudo_labels", row)[index] != 255, free)
            groups = cache.read("pseudo_labels", row, index)
            regions = region_tokens(dense, groups[None], 5)[0]
            np.testing.assert_allclose(cache.read("region_tokens", row, index), regions, atol=1)


def test_image_without_unannotated_token(world: World) -> None:
    assert (open_cache(world.folder / "caches" / "tiny").read("pseudo_labels", 3) == 255).all()


def test_second_run_does_nothing_and_two_runs_are_byte_identical(copy: World) -> None:
    first = copy.folder / "caches" / "tiny"
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}
    again = copy.run("precompute", "--config", copy.config, "--cache", first)
    assert "nothing to do" in again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}
    # The teacher's paths stand in the settings, so the second cache must be made from the same files.
    settings = json.loads((first / "manifest.json").read_text())["settings"]
    teacher = [f"--set=teacher.{key}={settings['teacher'][key]}" for key in ("model", "pretrained")]
    copy.run("precompute", "--config", copy.config, *teacher, "--cache", "caches/other")
    assert tree(copy.folder / "caches" / "other") == tree(first)


def test_killed_and_continued_equals_unbroken(copy: World) -> None:
    target = copy.folder / "caches" / "killed"
    settings = json.loads((copy.folder / "caches" / "tiny" / "manifest.json").read_text())["settings"]
    teacher = [f"--set=teacher.{key}={settings['teacher'][key]}" for key in ("model", "pretrained")]
    arguments = ["precompute", "--config", str(copy.config), *teacher, "--cache", str(target)]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), *arguments],
        cwd=copy.folder, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(target.glob("shards/*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    copy.run(*arguments)
    assert tree(target) == tree(copy.folder / "caches" / "tiny")


def test_a_cache_goes_on_with_the_kmeans_that_it_was_begun_with(copy: World, config: Config) -> None:
    """Though this device would take the other, which labels image 5 otherwise."""
    folder = copy.folder / "caches" / "begun"
    command = ("precompute", "--config", copy.config, "--cache", folder, "--set", "pseudo_labels.windows=[2]")
    assert "goes on with" not in copy.run(*command).stderr
    cache = open_cache(folder)
    assert cache.manifest.kmeans == "faiss"
    by_faiss = cache.load("kmeans_labels")
    for key in (MANIFEST, copy_key(MANIFEST)):
        (folder / key).write_bytes(cache.manifest.model_copy(update={"kmeans": "torch"}).to_bytes())
    (folder / record_key(1)).unlink()
    assert "started with the K-means of torch, and keeps it (the default here is faiss)" in copy.run(*command).stderr
    cache = open_cache(folder)
    assert cache.manifest.kmeans == "torch"
    labels, unannotated = cache.load("kmeans_labels")[5], cache.load("pseudo_labels")[5] != 255
    settings = config.pseudo_labels.model_copy(update={"windows": (2,)})
    expected = pseudo_labels(torch.from_numpy(cache.dense_tokens(5)), unannotated, settings, "torch")
    np.testing.assert_array_equal(labels, expected[0])
    assert (labels != by_faiss[5]).any()


def test_other_settings_make_another_cache_and_are_refused_in_a_named_one(copy: World) -> None:
    line = copy.fails(
        "precompute", "--config", copy.config, "--cache", "caches/tiny", "--set", "pseudo_labels.lambda=0.5"
    )
    assert "pseudo_labels.lambda: cache 0.8, asked 0.5" in line
    before = tree(copy.folder / "caches" / "tiny")
    copy.run("precompute", "--config", copy.config, "--set", "pseudo_labels.lambda=0.5")
    made = list((copy.folder / "caches").glob("tiny-*"))
    assert len(made) == 1
    assert tree(copy.folder / "caches" / "tiny") == before


@pytest.mark.parametrize(
    ("path", "damage", "says"),
    [
        ("images/train-7.png", "delete", "missing"),
        ("masks/train-7.png", "delete", "missing"),
        ("images/train-7.png", "truncate", "truncated"),
        ("masks/train-7.png", "truncate", "truncated"),
    ],
)
def test_a_broken_file_is_named_and_its_shard_is_not_trusted(copy: World, path: str, damage: str, says: str) -> None:
    file = copy.data / "tiny" / path
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:200])
    line = copy.fails("precompute", "--config", copy.config, "--cache", "caches/new")
    assert str(file.relative_to(copy.folder)) in line
    assert says in line
    assert not (copy.folder / "caches" / "new" / "shards" / "00001.json").exists()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--dataset", "scens"], "did you mean 'scenes'"),
        (["--set", "pseudo_labels.lamda=0.5"], "pseudo_labels.lamda"),
        (["--set", "teacher.model=ViT-B-61"], "ViT-B-61"),
        (["--set", "teacher.pretrained=nowhere.safetensors"], "nowhere.safetensors"),
        (["--set", "views.size=63"], "views.size"),
        (["--set", "pseudo_labels.windows=[1]", "--set", "views.size=384"], "pseudo_labels.windows"),
        (["--set", "dataset.unseen=[hart]"], "hart"),
        (["--data-root", "nowhere"], "--data-root"),
        (["--device", "cuda:7"], "--device"),
    ],
)
def test_mistakes_are_one_line(copy: World, arguments: list[str], names: str) -> None:
    line = copy.fails("precompute", "--config", copy.config, *arguments, "--cache", "caches/new")
    assert names in line
