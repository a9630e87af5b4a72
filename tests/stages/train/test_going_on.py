"""What holds weights is never written over unasked, and the cures that are named work."""

import shutil
import threading
from pathlib import Path
from unittest import mock

import pytest

from configs.load import resolve
from stages.common.runs import begin_run, new_run, run_folder
from tests.conftest import World, tree


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def refused(world: World, run: Path) -> str:
    before = tree(run)
    line = world.fails("train", "--run", run)
    assert tree(run) == before
    return line


def test_a_checkpoint_is_no_run_to_train_in(world: World, run: Path) -> None:
    line = refused(world, run / "checkpoints" / "000004")
    assert "is a checkpoint" in line and f"to continue from the run's last one, run train --run {run};" in line


def test_going_on_at_a_chosen_checkpoint_as_the_line_says(world: World, tmp_path: Path) -> None:
    settings = ("--set=train.checkpoint_every=1", "--set=train.keep_checkpoints=4")
    run, new = tmp_path / "run", tmp_path / "new"
    world.run("train", "--cache", "caches/tiny", "--config", world.config, "--run", run, *settings)
    chosen = run / "checkpoints" / "000002"
    assert "copy it to NEW/checkpoints/000002 and its config.yaml to NEW, then run train --run NEW" in refused(
        world, chosen
    )
    shutil.copytree(chosen, new / "checkpoints" / chosen.name)
    shutil.copy(chosen / "config.yaml", new)
    assert "after iteration 2" in world.run("train", "--run", new, "--cache", "caches/tiny").stderr
    assert (new / "student.safetensors").read_bytes() == (run / "student.safetensors").read_bytes()


def test_a_run_from_before_a_free_setting_goes_on(world: World, run: Path) -> None:
    before = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(before.replace("  checkpointing: false\n", ""))
    assert (run / "config.yaml").read_text() != before
    assert "is finished: nothing to do" in world.run("train", "--run", run).stderr


@pytest.mark.parametrize("left", ["no folder", "an empty folder", "half a save"])
def test_a_run_without_checkpoints_keeps_its_weights(world: World, run: Path, left: str) -> None:
    shutil.rmtree(run / "checkpoints")
    if left != "no folder":
        (run / "checkpoints" / (".partial" if left == "half a save" else "")).mkdir(parents=True)
    assert "has weights, but no checkpoint to continue from" in refused(world, run)


def test_a_checkpoint_taken_elsewhere_keeps_its_weights(world: World, run: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(run / "checkpoints" / "000004", tmp_path / "deep" / "below" / "alone"))
    assert "is a checkpoint: to continue from this one" in refused(world, alone)
    (alone / "state.json").unlink()
    assert "has weights" in refused(world, alone)


@pytest.mark.slow
def test_an_exported_folder_keeps_its_weights(world: World, trained: Path, tmp_path: Path) -> None:
    world.run("export", "--run", trained, "--output", tmp_path / "model")
    assert "has weights" in refused(world, tmp_path / "model")


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(world: World, tmp_path: Path) -> None:
    arguments = ("train", "--cache", "caches/tiny", "--config", world.config, "--run", tmp_path / "run")
    with mock.patch("stages.train.stage.RunLog", side_effect=KeyboardInterrupt):
        world.run(*arguments, check=False)
    assert (tmp_path / "run" / "config.yaml").exists()
    assert "trained 4 iterations" in world.run("train", "--run", tmp_path / "run", "--cache", "caches/tiny").stderr


def test_trainings_that_start_at_one_instant_take_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    taken, barrier = [], threading.Barrier(8)

    def take() -> None:
        barrier.wait()
        taken.append(new_run(None, "tiny"))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(taken)) == 8


def test_the_second_of_two_in_one_named_folder_is_refused(world: World, tmp_path: Path) -> None:
    """Both have looked at the folder when the first one begins."""
    first, second = (resolve(config=world.config, assignments=[f"train.seed={seed}"]) for seed in (1, 2))
    path = tmp_path / "run"
    assert run_folder(path, first) == run_folder(path, second) == path
    begin_run(path, first)
    before = (path / "config.yaml").read_bytes()
    with pytest.raises(Exception, match=r"train.seed: run 1, asked 2"):
        begin_run(path, second)
    assert (path / "config.yaml").read_bytes() == before
