"""A training that is stopped, killed or damaged and then continued equals one that was left alone, byte for byte."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.metrics import Scores
from stages.common.runs import one_trainer
from stages.train.checkpoints import Checkpoints
from stages.train.log import RunLog
from stages.train.provenance import git_state
from stages.train.stopping import Stop
from tests.conftest import ROOT, World

STEPS = 6
SETTINGS = [
    part for setting in (
        f"train.iterations={STEPS}", "train.batch_size=3", "train.checkpoint_every=2", "train.validate_every=3",
        "train.keep_checkpoints=3", "train.ema=0.8", "student.model=timm:test_efficientnet",
    ) for part in ("--set", setting)
]  # fmt: skip


def train(world: World, run: Path, *more: str) -> list[str | Path]:
    return ["train", "--cache", "caches/tiny", "--config", world.config, "--run", run, *SETTINGS, *more]


def result(run: Path) -> dict[str, bytes]:
    """Everything that must not depend on how often a run was stopped."""
    last = max((run / "checkpoints").glob("[0-9]*"))
    files = [run / name for name in ("log.jsonl", "scores.jsonl", "student.safetensors", "config.yaml")]
    return {str(file.relative_to(run)): file.read_bytes() for file in [*files, *last.iterdir()]}


def steps(run: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def one_image_at_a_time() -> Iterator[None]:
    """In calibration and validation, so that they are checked for signals between images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.apply.predictor.CPU_PIXELS", 1)
        yield


@pytest.fixture(scope="module")
def undisturbed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    world.run(*train(world, run))
    return run


def signal_after(step: int, number: signal.Signals) -> "mock._patch[Callable[..., None]]":
    """Sends the signal while this step's losses are logged."""
    log = RunLog.losses

    def losses(self: RunLog, iteration: int, *arguments: object) -> None:
        log(self, iteration, *arguments)
        if iteration == step:
            os.kill(os.getpid(), number)

    return mock.patch.object(RunLog, "losses", losses)


@pytest.fixture(scope="module")
def stopped(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that got a SIGTERM in its fifth step; its checkpoints are those of steps 3, 4 and 5."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with signal_after(5, signal.SIGTERM):
        done = world.run(*train(world, run))
    assert f"saved after iteration 5: to continue, run train --run {run}" in done.stderr
    return run


@pytest.fixture()
def broken_off(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def test_sigterm_saves_and_the_run_goes_on_by_its_name_alone(world: World, broken_off: Path, undisturbed: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert steps(broken_off) == [1, 2, 3, 4, 5]
    assert "after iteration 5" in world.run("train", "--run", broken_off).stderr
    assert result(broken_off) == result(undisturbed)
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(json.loads((broken_off / "run.json").read_text())["starts"]) == 2


def test_ctrl_c_saves_and_exits_130(world: World, undisturbed: Path, tmp_path: Path) -> None:
    with signal_after(1, signal.SIGINT):
        assert world.run(*train(world, tmp_path / "run"), check=False).returncode == 130
    assert steps(tmp_path / "run") == [1]
    world.run(*train(world, tmp_path / "run"))
    assert result(tmp_path / "run") == result(undisturbed)


@pytest.mark.parametrize(("at", "checks"), [(2, 3), (12, 13), (22, 22)])
def test_sigterm_in_a_validation_does_not_wait_for_its_end(
    world: World, undisturbed: Path, tmp_path: Path, at: int, checks: int
) -> None:
    """Nor for the calibration before the checkpoint, twice on ten images; the validation then looks once more."""
    seen = []

    def count(stop: Stop) -> None:
        seen.append(stop)
        if len(seen) == at:  # the first check comes before the images, the others after each
            os.kill(os.getpid(), signal.SIGTERM)
        check(stop)

    check = Stop.check
    with mock.patch.object(Stop, "check", count):
        world.run(*train(world, tmp_path / "run"))
    assert len(seen) == checks
    assert steps(tmp_path / "run") == [1, 2, 3] and not (tmp_path / "run" / "scores.jsonl").exists()
    world.run(*train(world, tmp_path / "run"))
    assert result(tmp_path / "run") == result(undisturbed)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit of the tensors": lambda folder: flip(folder / "training.safetensors"),
    "a bit of the state": lambda folder: flip(folder / "state.json"),
    "a bit of the checksums": lambda folder: flip(folder / "SHA256SUMS"),
    "no checksums": lambda folder: (folder / "SHA256SUMS").unlink(),
    "empty": lambda folder: [file.unlink() for file in folder.iterdir()],
    "half a file": lambda folder: os.truncate(folder / "training.safetensors", 1000),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(damage: Callable[[Path], object], broken_off: Path) -> None:
    checkpoints = Checkpoints(broken_off, keep=1)
    assert checkpoints.iterations() == [3, 4, 5]
    damage(checkpoints.path(5))
    state = checkpoints.newest()
    assert state is not None and state["iteration"] == 4
    assert checkpoints.iterations() == [3, 4]


def test_a_run_goes_on_before_a_damaged_checkpoint(world: World, broken_off: Path, undisturbed: Path) -> None:
    """With what a kill leaves: half a checkpoint, half a line, a line of a step that is lost."""
    flip(broken_off / "checkpoints" / "000005" / "state.json")
    (broken_off / "checkpoints" / ".partial").mkdir()
    (broken_off / "checkpoints" / ".partial" / "state.json").write_text("{")
    with (broken_off / "log.jsonl").open("a") as log:
        log.write(json.dumps({"iteration": 6, "total": 0.0}) + '\n{"iterat')
    done = world.run("train", "--run", broken_off)
    assert "000005 is damaged (state.json has changed)" in done.stderr
    assert result(broken_off) == result(undisturbed)


def test_when_every_checkpoint_is_damaged_nothing_is_lost_unasked(world: World, broken_off: Path) -> None:
    for checkpoint in (broken_off / "checkpoints").glob("[0-9]*"):
        flip(checkpoint / "training.safetensors")
    assert "every checkpoint" in world.fails("train", "--run", broken_off)
    assert steps(broken_off) == [1, 2, 3, 4, 5]


def test_other_settings_are_named(world: World, broken_off: Path) -> None:
    line = world.fails(*train(world, broken_off, "--set", "train.lr=0.1", "--seed", "9"))
    assert "train.lr: run 0.001, asked 0.1" in line and "train.seed: run 0, asked 9" in line
    assert "loss.bank" in world.fails("train", "--run", broken_off, "--set", "loss.bank=1")


def test_settings_that_change_nothing_of_the_result_may_differ(
    world: World, broken_off: Path, undisturbed: Path
) -> None:
    world.run("train", "--run", broken_off, "--set", "train.workers=1", "--set", "train.keep_checkpoints=4")
    for name in ("log.jsonl", "scores.jsonl", "student.safetensors"):
        assert (broken_off / name).read_bytes() == (undisturbed / name).read_bytes()
    settings = yaml.safe_load((broken_off / "config.yaml").read_text())["train"]
    assert (settings["workers"], settings["keep_checkpoints"]) == (1, 4)


def test_another_cache_is_named(world: World, broken_off: Path) -> None:
    """Of the same settings: labels made again from stored tokens."""
    relabelled = world.folder / "caches" / "relabelled"
    if not relabelled.exists():
        world.run("precompute", "--only", "pseudo-labels", "--cache", "caches/tiny", "--config", world.config)
        made = max((world.folder / "caches").glob("tiny-*"), key=lambda path: path.stat().st_mtime)
        made.rename(relabelled)
    line = world.fails("train", "--run", broken_off, "--cache", relabelled)
    assert f"was started with cache {world.folder}/caches/tiny" in line or "was started with cache caches/tiny" in line
    assert "--cache" in line and steps(broken_off) == [1, 2, 3, 4, 5]


def test_a_run_has_one_trainer(world: World, broken_off: Path) -> None:
    with one_trainer(broken_off):
        me = f"(host {socket.gethostname()}, process {os.getpid()})"
        assert f"is being trained by another process {me}: wait for it" in world.fails("train", "--run", broken_off)
    assert not (broken_off / ".lock").exists()


def test_the_last_and_the_best_checkpoints_are_kept(world: World, tmp_path: Path) -> None:
    scores = iter([10.0, 30.0, 30.0, 20.0, 5.0, 29.0])

    def evaluated(*arguments: object) -> list[Scores]:
        value = next(scores)
        return [Scores(value, value, value, value, value, [])] * 2  # at the run's gamma and at 0

    with mock.patch("stages.train.validation.evaluate_predictor", evaluated):
        one = ("--set", "train.validate_every=1", "--set", "train.keep_checkpoints=1")
        world.run(*train(world, tmp_path / "run", *one))
    assert Checkpoints(tmp_path / "run", keep=1).iterations() == [2, 6]
    assert "hIoU" in world.run("evaluate", "--run", tmp_path / "run" / "checkpoints" / "000002").stdout


def test_ema_equals_the_slow_reference(world: World, tmp_path: Path, undisturbed: Path) -> None:
    plain = train(world, tmp_path / "run", "--set", "train.ema=null", "--set", "train.checkpoint_every=1")
    world.run(*plain, "--set", "train.keep_checkpoints=99")
    losses = [(run / "log.jsonl").read_text() for run in (tmp_path / "run", undisturbed)]
    assert losses[0] == losses[1]  # the average takes no part in training
    weights = [load_file(file) for file in sorted((tmp_path / "run").glob("checkpoints/*/student.safetensors"))]
    assert len(weights) == STEPS
    averaged = load_file(undisturbed / "student.safetensors")
    assert averaged.keys() == weights[0].keys()
    assert averaged.pop("spread").any()  # of the average itself, as calibrated
    moved = 0
    for name, found in averaged.items():
        expected = weights[0][name].double().numpy()
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            for later in weights[1:]:
                expected = 0.8 * expected + 0.2 * later[name].double().numpy()
        else:
            expected = weights[-1][name].double().numpy()
        np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-5, atol=1e-6)
        moved += not np.allclose(expected, weights[-1][name].numpy(), rtol=1e-4)
    assert moved > 10


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_step_term_and_images(world: World, tmp_path: Path, value: float) -> None:
    calls: list[int] = []

    def broken(*arguments: object) -> torch.Tensor:
        calls.append(1)
        return torch.tensor(value if len(calls) == 3 else 0.5)

    with mock.patch("pipeline.learning.criterion.prototype_bce", broken):
        line = world.fails(*train(world, tmp_path / "run"))
    assert "iteration 3: loss bce is not finite" in line
    # The third batch of three is the sixth to eighth of the first epoch's ten images.
    order = np.random.default_rng([0, 0]).permutation(10)[6:9]
    assert str([f"train-{row}" for row in order]) in line
    assert steps(tmp_path / "run") == [1, 2]


def test_tensorboard_shows_each_step_once(world: World, broken_off: Path) -> None:
    flip(broken_off / "checkpoints" / "000005" / "training.safetensors")
    world.run("train", "--run", broken_off)
    board = EventAccumulator(str(broken_off)).Reload()
    assert [event.step for event in board.Scalars("loss/total")] == [1, 2, 3, 4, 5, 6]
    lines = [json.loads(line) for line in (broken_off / "log.jsonl").read_text().splitlines()]
    for name in ("global", "bce", "nel", "ce", "total"):
        found = [event.value for event in board.Scalars(f"loss/{name}")]
        np.testing.assert_allclose(found, [line[name] for line in lines], rtol=1e-6)
    # Warm-up over one step, poly decay to 0: of 1e-3.
    expected = [1e-3 * min(1, (step + 1) / 2) * (1 - step / STEPS) for step in range(STEPS)]
    np.testing.assert_allclose([line["lr"] for line in lines], expected)
    assert [event.step for event in board.Scalars("holdout/hiou")] == [3, 6]
    for name in ("holdout/predictions", "train/attention"):
        assert [event.step for event in board.Images(name)] == [3, 6]


def test_run_json_says_what_a_run_was_made_by(undisturbed: Path) -> None:
    (start,) = json.loads((undisturbed / "run.json").read_text())["starts"]
    assert start["packages"]["torch"] == version("torch")
    assert start["cache"] == "caches/tiny" and start["after_iteration"] == 0 and start["device"] == "cpu"


def test_git_state(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert git_state(tmp_path) == {"commit": commit, "changed": []}
    (tmp_path / "new.py").write_text("")
    assert git_state(tmp_path) == {"commit": commit, "changed": ["?? new.py"]}
    (tmp_path / "below").mkdir()
    assert git_state(tmp_path / "below") is None


def test_wandb_is_optional(world: World, tmp_path: Path) -> None:
    arguments = train(world, tmp_path / "run", "--set", "train.wandb=project")
    with mock.patch.dict(sys.modules, {"wandb": None}):
        assert "pip install wandb" in world.fails(*arguments)
    assert not (tmp_path / "run").exists()
    package = mock.MagicMock()
    with mock.patch.dict(sys.modules, {"wandb": package}):
        world.run(*arguments, "--set", "train.iterations=2")
    assert package.init.call_args.kwargs["project"] == "project"
    logged = [call.args[0] for call in package.init.return_value.log.call_args_list]
    assert [values["iteration"] for values in logged if "loss/total" in values] == [1, 2]
    assert package.init.return_value.finish.called


def test_a_full_disk_is_one_line(world: World, tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch("stages.train.checkpoints.save_file", side_effect=full):
        line = world.fails(*train(world, tmp_path / "run"))
    assert "000002" in line and "No space left" in line
    assert Checkpoints(tmp_path / "run", keep=1).iterations() == []


def test_kills(world: World, tmp_path: Path) -> None:
    """A short form of benchmarks/train_kills.py, on the world."""
    shutil.copytree(world.folder, tmp_path / "world")
    command = [sys.executable, str(ROOT / "benchmarks" / "train_kills.py"), "--kills", "3", "--folder", "world", "--"]
    settings = ["--cache", "caches/tiny", "--config", world.config, *SETTINGS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *settings], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "   3  kills\n" in done.stdout


def test_every_kind_of_state_survives_a_checkpoint(tmp_path: Path) -> None:
    state = {
        "empty": {}, "none": None, "numbers": [1, 0.1, -2**70], "nested": {3: {"x": torch.arange(3)}},
        "scalar": torch.tensor(0.1), "bf16": torch.tensor([1.5], dtype=torch.bfloat16), "nothing": torch.zeros(0, 4),
        "strided": torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "list": [torch.ones(2), (1, 2)], "shared": torch.ones(4)[1:],
    }  # fmt: skip
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.newest() is None
    checkpoints.save(7, state, lambda folder: None)
    found = checkpoints.newest()
    assert found is not None and list(found) == list(state)
    assert (found["empty"], found["none"], found["numbers"]) == ({}, None, [1, 0.1, -(2**70)])
    for name in ("scalar", "bf16", "nothing", "strided", "shared"):
        assert found[name].dtype == state[name].dtype and torch.equal(found[name], state[name])
    assert torch.equal(found["nested"][3]["x"], torch.arange(3))
    assert torch.equal(found["list"][0], torch.ones(2)) and found["list"][1] == [1, 2]
