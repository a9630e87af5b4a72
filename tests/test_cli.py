"""How the command line ends: mistakes, faults, Ctrl-C; and how much it says."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest

import stages.precompute.stage
import stages.train.stage
from tests.conftest import ROOT, World

TRAIN = ("train", "--cache", "caches/tiny")


@pytest.mark.parametrize("debug", [False, True])
def test_a_fault_is_a_line_and_a_traceback_on_demand(world: World, debug: bool) -> None:
    with mock.patch.object(stages.train.stage, "train", side_effect=RuntimeError("it\nbroke")):
        done = world.run(*(["--debug"] if debug else []), *TRAIN, "--config", world.config, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: internal error: it broke (RuntimeError): for the traceback")
    assert ("Traceback" in done.stderr) == debug


def test_a_mistake_is_exit_code_2_with_debug_too(world: World) -> None:
    done = world.run("--debug", *TRAIN, "--set", "loss.bnk=2", check=False)
    assert done.returncode == 2 and "Traceback" in done.stderr
    assert "did you mean 'loss.bank'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_says_nothing_but_results(world: World, trained: Path, quiet: bool) -> None:
    arguments = ("evaluate", "--run", trained, "--set", "evaluate.gamma=0")
    done = world.run(*(["--quiet"] if quiet else []), *arguments)
    assert "hIoU" in done.stdout
    assert (not done.stderr) == quiet


def test_a_mistake_is_said_though_quiet(world: World) -> None:
    assert "no cache at nowhere" in world.fails("--quiet", "train", "--cache", "nowhere")


def test_ctrl_c_says_how_to_go_on(world: World, tmp_path: Path) -> None:
    with mock.patch.object(stages.precompute.stage, "precompute", side_effect=KeyboardInterrupt):
        done = world.run("precompute", "--config", world.config, "--cache", tmp_path / "x", check=False)
    assert done.returncode == 130 and "run the same command to continue" in done.stderr


@pytest.mark.parametrize("when", ["workers start", "dashboard"])
def test_ctrl_c_ends_all_processes_without_a_traceback(world: World, tmp_path: Path, when: str) -> None:
    """A terminal's Ctrl-C reaches Dask's workers too."""

    def begun(process: subprocess.Popen[bytes]) -> bool:
        if when == "dashboard":
            return when in (tmp_path / "said").read_text()
        return len(psutil.Process(process.pid).children(recursive=True)) > 1  # multiprocessing's tracker, and a worker

    arguments = ("precompute", "--config", world.config, "--cache", tmp_path / "x", "--set", "views.seed=1")
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, ROOT / "cli.py", *arguments], cwd=world.folder, stderr=said, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 600
            while not begun(process):
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "said").read_text()
                time.sleep(0.1)
            time.sleep(0.5 * (when != "dashboard"))  # it imports
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(120) == 130
            while group_lives(process.pid):
                assert time.monotonic() < deadline
                time.sleep(0.1)
        finally:
            if group_lives(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
    text = (tmp_path / "said").read_text()
    assert "Traceback" not in text, text
    assert "stopped: run the same command to continue" in text


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (["trian"], r"No such command 'trian'\. Did you mean 'train'\? \(see .+ --help\)"),
        (["train", "--sed", "1"], r"No such option: --sed.* \(see .+ train --help\)"),
        (["cache", "info"], r"Missing argument 'CACHE' \(see .+ cache info --help\)"),
        (["train", "--seed"], r"Option '--seed' requires an argument"),
        (["train", "--seed", "x"], r"Invalid value for '--seed': .*valid integer.*\(see .+ train --help\)"),
    ],
)
def test_a_mistake_in_the_command_line_is_one_line(world: World, command: list[str], line: str) -> None:
    done = world.run(*command, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(f"error: {line}\n", done.stderr)


@pytest.mark.parametrize("command", [[], ["cache"]])
def test_a_verb_alone_shows_its_help(world: World, command: list[str]) -> None:
    done = world.run(*command, check=False)
    assert done.returncode == 2 and "Usage:" in done.stdout and not done.stderr


def test_without_its_packages_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-S", ROOT / "cli.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: No module named 'typer': activate") and done.stderr.count("\n") == 1
