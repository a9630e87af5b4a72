"""Stage two, evaluation and inspection through the front door."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cache.reader import open_cache
from configs.load import resolve
from pipeline.data.dataset import SegmentationDataset
from pipeline.learning.criterion import Criterion
from stages.apply.predictor import student_predictor
from stages.common.runs import load_run
from tests import reference
from tests.conftest import ROOT, World

TRAIN = ("train", "--cache", "caches/tiny")


def losses(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_run_holds_what_it_needs(trained: Path) -> None:
    wanted = {"config.yaml", "student.safetensors", "log.jsonl", "scores.jsonl", "run.json", "checkpoints"}
    assert wanted <= {path.name for path in trained.iterdir()}
    assert list(trained.glob("events.out.tfevents*"))
    assert len(losses(trained)) == 4
    assert set(losses(trained)[0]) == {"iteration", "global", "local", "bce", "nel", "ce", "total", "lr"}


def test_same_seed_gives_equal_losses_and_weights_another_seed_does_not(world: World, trained: Path) -> None:
    for name, seed in (("again", "3"), ("other", "4")):
        shutil.rmtree(world.folder / "runs" / name, ignore_errors=True)
        world.run(*TRAIN, "--config", world.config, "--run", f"runs/{name}", "--seed", seed)
    again, other = world.folder / "runs" / "again", world.folder / "runs" / "other"
    assert losses(trained) == losses(again)
    assert losses(trained) != losses(other)
    first, second = load_file(trained / "student.safetensors"), load_file(again / "student.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_the_student_never_imports_open_clip(world: World, trained: Path, verb: str) -> None:
    import subprocess

    script = (
        "import sys; import cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' in sys.modules and 'open_clip' not in sys.modules, 'open_clip was imported'\n"
    )
    shutil.rmtree(world.folder / "runs" / "alone", ignore_errors=True)
    arguments = [*TRAIN, "--config", str(world.config), "--run", "runs/alone", "--set", "train.iterations=1"]
    if verb == "evaluate":
        arguments = ["evaluate", "--run", str(trained), "--data-root", str(world.data)]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=world.folder, env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "switch",
    ["global=false", "nel=false", "ce=false", "bce=false", "glm=max", "glm=mean", "bank=0", "synthesizer=mlp",
     "synthesizer=features"],
)  # fmt: skip
def test_switches_of_the_tables_train(world: World, switch: str, tmp_path: Path) -> None:
    world.run(
        *TRAIN, "--config", world.config, "--run", tmp_path / "run", "--set", f"loss.{switch}",
        "--set", "train.iterations=1",
    )  # fmt: skip
    name, _, value = switch.partition("=")
    assert (name in losses(tmp_path / "run")[0]) == (name != value and value != "false" and name in ("global", "nel"))


def test_unseen_masks_never_reach_training(world: World, trained: Path, tmp_path: Path) -> None:
    """Unseen classes scrambled among themselves and with "ignored": the same cache, losses and weights, to the bit."""
    shutil.copytree(world.folder, tmp_path / "world")
    other = World(tmp_path / "world")
    config = resolve(config=world.config)
    unseen = np.array(config.dataset.unseen_indices)
    for path in (other.data / "tiny" / "masks").glob("train-*.png"):
        mask = np.array(Image.open(path))
        hidden = np.isin(mask, unseen)
        mask[hidden] = np.random.default_rng(0).choice([*unseen, 255], hidden.sum())
        Image.fromarray(mask).save(path)
    other.run("precompute", "--config", world.config, "--cache", "caches/scrambled")
    scrambled, plain = (open_cache(other.folder / "caches" / name) for name in ("scrambled", "tiny"))
    assert scrambled.manifest.fingerprint != plain.manifest.fingerprint  # the files differ
    for name in plain.manifest.arrays:
        np.testing.assert_array_equal(scrambled.load(name), plain.load(name))
    other.run("train", "--cache", "caches/scrambled", "--config", world.config, "--run", "runs/new", "--seed", "3")
    assert losses(other.folder / "runs" / "new") == losses(trained)
    first, second = (load_file(run / "student.safetensors") for run in (trained, other.folder / "runs" / "new"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_evaluate_equals_the_slow_reference(world: World, trained: Path, tmp_path: Path) -> None:
    report = tmp_path / "scores.json"
    world.run("evaluate", "--run", trained, "--set", "evaluate.gamma=0.03", "--json", report)
    found = json.loads(report.read_text())
    run = load_run(trained)
    dataset = SegmentationDataset(run.config.dataset, world.data, "val")
    predict = student_predictor(run.student, run.text_features, run.config)
    seen, unseen = run.config.dataset.seen_indices, run.config.dataset.unseen_indices
    total = np.zeros((20, 20))
    for row in range(len(dataset)):
        logits = predict(dataset.image(row)).upsampled(list(range(20))).numpy()
        prediction = reference.calibrated_argmax(logits, seen, 0.03)
        total += reference.confusion(dataset.mask(row), prediction, 20)
    expected = reference.scores(total, seen, unseen)
    assert found["gamma"] == 0.03
    assert found["pixel_accuracy"] == pytest.approx(100 * expected["pAcc"])
    assert found["miou_seen"] == pytest.approx(100 * expected["mIoU_seen"])
    assert found["miou_unseen"] == pytest.approx(100 * expected["mIoU_unseen"])
    iou = [np.nan if value is None else value for value in found["iou"].values()]
    np.testing.assert_allclose(iou, 100 * expected["IoU"])


def test_evaluate_teacher_dense_and_newest_run(world: World, trained: Path) -> None:
    of_run = world.run("evaluate", "--teacher-dense", "--run", trained).stdout
    assert "on tiny/val" in of_run  # the run's dataset and teacher
    assert "hIoU" in world.run("evaluate", "--teacher-dense", "--config", world.config).stdout
    assert "unseen" in world.run("evaluate").stdout


def test_inspect_writes_the_picture_and_the_table(world: World, tmp_path: Path) -> None:
    picture = tmp_path / "regions.png"
    images = ("--image", "train-0", "--image", "train-3")
    shown = world.run("inspect-pseudolabels", *images, "--terminal", "--png", picture)
    assert "train-0" in shown.stdout
    assert "purity" in shown.stdout
    assert Image.open(picture).size[0] > 5 * 192


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["train", "--cache", "nowhere"], "nowhere"),
        (["train", "--cache", "caches/tiny", "--set", "pseudo_labels.lambda=0.5"], "pseudo_labels.lambda: cache 0.8"),
        (["train", "--cache", "caches/tiny", "--set", "student.model=no_such_net"], "no_such_net"),
        (["train", "--cache", "caches/tiny", "--set", "train.itertions=3"], "train.itertions"),
        (["train", "--cache", "caches/tiny", "--data-root", "nowhere"], "--data-root"),
        (["train", "--dataset", "scenes"], "precompute --dataset scenes"),
        (["evaluate", "--run", "nowhere"], "nowhere"),
        (["evaluate", "--json", "no/such/folder/scores.json"], "no/such/folder"),
        (["inspect-pseudolabels", "--png", "picture.txt"], "picture.txt"),
        (["inspect-pseudolabels", "--output", "data"], "data holds other files"),
        (["inspect-pseudolabels", "--output", "tiny.yaml"], "tiny.yaml is a file"),
        (["inspect-pseudolabels", "--image", "train-99"], "train-99"),
        (["inspect-pseudolabels", "--cache", "data"], "data"),
    ],
)
def test_mistakes_are_one_line(world: World, arguments: list[str], names: str) -> None:
    if "train" in arguments and "scenes" not in arguments:
        arguments = [*arguments, "--config", str(world.config)]
    assert names in world.fails(*arguments)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_line(world: World, tmp_path: Path, workers: int) -> None:
    """In a loader worker too, whose errors come with its own traceback."""
    shutil.copytree(world.folder, tmp_path / "world")
    other = World(tmp_path / "world")
    for path in (other.data / "tiny" / "images").glob("train-*.png"):
        content = path.read_bytes()  # of the same size, so that the cache still fits
        path.write_bytes(content[:100] + bytes(len(content) - 100))
    line = other.fails(*TRAIN, "--config", world.config, "--run", "runs/broken", f"--set=train.workers={workers}")
    assert line.startswith("error: image ") and "images/train-" in line


def test_damaged_runs_are_refused(world: World, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    weights = tmp_path / "run" / "student.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert f"train --run {tmp_path}" in world.fails("evaluate", "--run", tmp_path / "run")
    weights.unlink()
    assert "student.safetensors" in world.fails("evaluate", "--run", tmp_path / "run")
    assert "nothing to do" in world.run("train", "--run", tmp_path / "run").stderr  # but to put the weights back
    assert weights.read_bytes() == whole
    (tmp_path / "run" / "config.yaml").unlink()
    assert "not empty" in world.fails(*TRAIN, "--config", world.config, "--run", tmp_path / "run")


def test_a_corrupt_cache_is_refused(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.folder / "caches" / "tiny", tmp_path / "tiny")
    shard = next((tmp_path / "tiny" / "arrays" / "cls_tokens").glob("c.1*"))
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    line = world.fails("train", "--cache", tmp_path / "tiny", "--config", world.config)
    assert str(shard) in line and "run cache repair" in line
    (tmp_path / "tiny" / "shards" / "00001.json").unlink()
    assert "precompute" in world.fails("train", "--cache", tmp_path / "tiny", "--config", world.config)


def test_the_criterion_knows_how_far_the_training_is(world: World, tmp_path: Path) -> None:
    forward, seen = Criterion.forward, []

    def noting(self: Criterion, *arguments: Any, **named: Any) -> Any:
        seen.append(arguments[-1])
        return forward(self, *arguments, **named)

    with mock.patch.object(Criterion, "forward", noting):
        world.run(
            "train", "--cache", "caches/tiny", "--config", world.config, "--run", tmp_path / "run",
            "--set", "loss.glm=selective",
        )  # fmt: skip
    assert seen == [0, 0.25, 0.5, 0.75]


def test_a_runs_files_can_be_read_by_whom_its_folder_can(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    wanted = (tmp_path / "any").stat().st_mode
    assert {file.name: file.stat().st_mode for file in trained.iterdir() if file.is_file()} == {
        file.name: wanted for file in trained.iterdir() if file.is_file()
    }
