"""What has no value never becomes a number, and what is not finite is neither kept nor reported."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.student.student import Student
from pipeline.teacher.clip import FrozenClip
from stages.common.runs import load_run
from stages.studies.ablate import verdict
from stages.train.learner import Learner
from tests.conftest import World
from tests.stages.studies.test_ablate import Sign, result

TRAIN = ("train", "--cache", "caches/tiny")
UNSEEN = [4, 6, 8, 14, 16, 19]  # of the world's dataset


@pytest.fixture
def other(world: World, trained: Path, tmp_path: Path) -> World:
    """The world's data, cache and run, to be changed."""
    for name in ("data", "caches", "runs"):
        shutil.copytree(world.folder / name, tmp_path / name)
    return World(tmp_path)


def change_masks(world: World, split: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for path in (world.data / "tiny" / "masks").glob(f"{split}-*.png"):
        Image.fromarray(change(np.array(Image.open(path)))).save(path)


def unseen_to(value: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda mask: np.where(np.isin(mask, UNSEEN), value, mask).astype(np.uint8)


def seen_to(value: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda mask: np.where(np.isin(mask, UNSEEN), mask, value).astype(np.uint8)


@pytest.mark.parametrize(
    ("change", "none"),
    [
        (lambda mask: 0 * mask + 255, {"pixel_accuracy", "miou", "miou_seen", "miou_unseen", "hiou"}),
        (unseen_to(255), {"miou_unseen", "hiou"}),
        (seen_to(255), {"miou_seen", "hiou"}),
    ],
    ids=["no label", "no unseen pixel", "no seen pixel"],
)
def test_a_split_without_pixels_has_no_scores(
    other: World, change: Callable[[np.ndarray], np.ndarray], none: set[str]
) -> None:
    change_masks(other, "val", change)
    arguments = ("evaluate", "--run", "runs/one", "--set", "evaluate.gamma=0")
    found = json.loads(other.run(*arguments, "--json", "-").stdout)
    means = ("pixel_accuracy", "miou", "miou_seen", "miou_unseen", "hiou")
    assert {name for name in means if found[name] is None} == none
    overall = other.run(*arguments).stdout.partition("class")[0]
    assert overall.count(" - ") == len(none) and "nan" not in overall


@pytest.mark.parametrize(("change", "lack"), [(unseen_to(0), "an unseen class"), (seen_to(19), "a seen class")])
def test_gamma_of_a_holdout_that_cannot_tell_is_refused(
    other: World, change: Callable[[np.ndarray], np.ndarray], lack: str
) -> None:
    change_masks(other, "holdout", change)
    assert lack in other.fails("evaluate", "--run", "runs/one", "--set", "evaluate.gamma=holdout")


def test_gamma_is_none_where_every_one_scores_zero(world: World, trained: Path) -> None:
    """And not the lowest, which would give everything to the seen classes."""
    with mock.patch("pipeline.metrics.harmonic_mean", return_value=0.0):
        done = world.run("evaluate", "--run", trained, "--set", "evaluate.gamma=holdout", "--json", "-")
    assert json.loads(done.stdout)["gamma"] is None and "no gamma: on split `holdout`" in done.stderr


@pytest.mark.slow
def test_training_without_an_annotated_pixel_has_no_gamma(other: World, world: World) -> None:
    change_masks(other, "train", lambda mask: 0 * mask + 255)
    other.run("precompute", "--config", world.config, "--cache", "caches/blind")
    done = other.run("train", "--cache", "caches/blind", "--config", world.config, "--run", "runs/blind")
    assert done.stderr.count("no gamma: the training images") == 1
    assert np.isnan(load_run(other.folder / "runs" / "blind").gamma)
    (line,) = map(json.loads, (other.folder / "runs" / "blind" / "scores.jsonl").read_text().splitlines())
    assert line["gamma"] is None and line["hiou"] == line["hiou_at_0"]
    assert "gamma -" in other.run("evaluate", "--run", "runs/blind").stdout
    other.run("export", "--run", "runs/blind", "--output", "model")
    assert json.loads((other.folder / "model" / "model.json").read_text())["gamma"] == 0


def test_validations_without_a_value_are_no_best(other: World, world: World) -> None:
    change_masks(other, "holdout", lambda mask: 0 * mask + 255)
    settings = ("--set=train.validate_every=2", "--set=train.keep_checkpoints=1")
    done = other.run(*TRAIN, "--config", world.config, "--run", "runs/blind", *settings)
    assert "hiou -" in done.stderr
    lines = [json.loads(line) for line in (other.folder / "runs/blind/scores.jsonl").read_text().splitlines()]
    assert [line["hiou"] for line in lines] == [None, None]
    assert [path.name for path in (other.folder / "runs/blind/checkpoints").glob("0*")] == ["000004"]
    (entry,) = [run for run in json.loads(other.run("runs", "--json", "-").stdout)["runs"] if "blind" in run["path"]]
    assert entry["score"] is None and entry["fault"] is None


def test_seeds_without_a_score_do_not_count() -> None:
    nan = float("nan")
    found = [result("x", 0, hiou=nan), result("y", 0, hiou=nan), result("x", 1, hiou=2.0), result("y", 1, hiou=1.0)]
    assert verdict(Sign(claim="c", better="x", worse="y"), found) == ("holds for one seed", "+1.0", 1)
    assert verdict(Sign(claim="c", better="x", worse="y"), found[:2])[0] == "not measured"


def test_alpha_is_kept_and_shown_beside_gamma(world: World, trained: Path) -> None:
    run = load_run(trained)
    assert run.alpha is not None and run.gamma is not None and run.alpha != 1
    shown = world.run("evaluate", "--run", trained).stdout
    assert f"gamma {run.gamma:.4g} (alpha {run.alpha:.4g}: {run.alpha * run.gamma:.4g} of training's logits)" in shown
    assert json.loads(world.run("evaluate", "--run", trained, "--json", "-").stdout)["alpha"] == run.alpha


# --- What is not finite ---


def spoil(folder: Path, value: float = float("nan"), name: str = "head.project.weight") -> None:
    file = folder / "student.safetensors"
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors[name].fill_(value)
    save_file(tensors, file, metadata)


@pytest.mark.parametrize("name", ["head.project.weight", "text_features"])
@pytest.mark.parametrize("command", [("evaluate",), ("predict", "data/tiny/images/val-0.png"), ("export",)])
def test_weights_that_are_not_finite_are_refused(other: World, command: tuple[str, ...], name: str) -> None:
    spoil(other.folder / "runs" / "one", float("inf"), name)
    line = other.fails(*command, "--run", "runs/one")
    assert f"runs/one/student.safetensors has values that are not finite ({name})" in line


def test_weights_that_give_infinity_are_refused(other: World) -> None:
    spoil(other.folder / "runs" / "one", 3e38)
    for command in (("evaluate",), ("predict", "data/tiny/images/val-0.png")):
        assert "logits that are not finite" in other.fails(*command, "--run", "runs/one")


@pytest.mark.parametrize(
    ("last", "said"),
    [(3, "student.head.project.bias is not finite after iteration 3"), (4, "logits that are not finite")],
)
def test_nothing_that_is_not_finite_is_saved(world: World, tmp_path: Path, last: int, said: str) -> None:
    """A step's gradient may do what no loss has met."""
    step = Learner.step

    def spoiling(self: Learner, *arguments: object) -> dict[str, float]:
        losses = step(self, *arguments)  # type: ignore[arg-type]
        if self.iteration == last:
            with torch.no_grad():
                self.student.head.project.bias[0] = torch.nan
        return losses

    settings = ("--config", world.config, "--run", tmp_path / "run", "--set=train.checkpoint_every=1")
    with mock.patch.object(Learner, "step", spoiling):
        line = world.fails(*TRAIN, *settings)
    assert said in line and "lower train.lr" in line
    assert max(path.name for path in (tmp_path / "run" / "checkpoints").glob("0*")) == f"{last - 1:06d}"
    assert (
        f"after iteration {last - 1}" in world.run("train", "--run", tmp_path / "run", "--cache", "caches/tiny").stderr
    )


def test_a_run_goes_on_before_a_checkpoint_that_is_not_finite(world: World, tmp_path: Path) -> None:
    """As older versions saved them: the training would stop at it for ever."""
    settings = ("--config", world.config, "--run", tmp_path / "run", "--set=train.checkpoint_every=2")
    with mock.patch("stages.train.checkpoints.not_finite", return_value=None):
        forward = Student.with_auxiliary
        calls: list[int] = []

        def spoiling(self: Student, pixels: torch.Tensor):  # type: ignore[no-untyped-def]
            calls.append(1)
            found = forward(self, pixels)
            if len(calls) == 3:
                with torch.no_grad():
                    self.head.project.bias[0] = torch.nan
            return found

        with mock.patch.object(Student, "with_auxiliary", spoiling):
            world.fails(*TRAIN, *settings, "--set=train.checkpoint_every=1")
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("0*"))
    assert saved[-1] == "000003"
    done = world.run("train", "--run", tmp_path / "run", "--cache", "caches/tiny")
    assert "000003 is damaged" in done.stderr and "is not finite" in done.stderr and "after iteration 2" in done.stderr


@pytest.mark.parametrize("part", ["image", "text"])
def test_a_teacher_that_is_not_finite_makes_no_cache(world: World, tmp_path: Path, part: str) -> None:
    made = FrozenClip.__init__

    def spoiled(self: FrozenClip, *arguments: object, **named: object) -> None:
        made(self, *arguments, **named)  # type: ignore[arg-type]
        with torch.no_grad():
            (self.model.visual.proj if part == "image" else self.model.text_projection)[0] = torch.inf

    monkey = mock.patch.object(FrozenClip, "__init__", spoiled)
    with monkey:
        arguments = ("--config", world.config, "--cache", tmp_path / "cache", "--set=dataset.templates=zegclip")
        line = world.fails("precompute", *arguments)
    assert "not finite" in line and "teacher.precision=fp32" in line
