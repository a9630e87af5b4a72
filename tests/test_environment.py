"""The environment and the numbers of a command line are input too: checked, one line, exit code 2."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from tests.conftest import ROOT, World

HUGE = "9" * 30
TRAIN = ("train", "--cache", "caches/tiny", "--config", "tiny-experiment.yaml")
JOINED = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "4"}, "'RANK' is not set"),
        ({"WORLD_SIZE": "four"}, "invalid literal"),
        ({"WORLD_SIZE": ""}, "invalid literal"),
        ({"WORLD_SIZE": HUGE}, "'RANK' is not set"),
        ({**JOINED, "RANK": "7"}, "RANK is 7"),
        ({**JOINED, "RANK": "-1"}, "RANK is -1"),
        ({**JOINED, "MASTER_PORT": "http"}, "invalid literal"),
        ({**JOINED, "MASTER_PORT": "70000"}, "port"),
        ({**JOINED, "MASTER_ADDR": ""}, "MASTER_ADDR"),
    ],
)
def test_a_stray_world_size(
    world: World, trained: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], said: str
) -> None:
    for name, value in environment.items():
        if value:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.setenv(name, "") if name == "WORLD_SIZE" else monkeypatch.delenv(name, raising=False)
    line = world.fails(*TRAIN)
    assert f"WORLD_SIZE={environment['WORLD_SIZE']} in the environment" in line and said in line
    assert "torchrun" in line and "`unset WORLD_SIZE`" in line


@pytest.mark.parametrize(
    "command",
    [
        ("precompute", "--config", "tiny-experiment.yaml", "--seed", HUGE),
        ("precompute", "--config", "tiny-experiment.yaml", "--lambda", HUGE),
        ("precompute", "--config", "tiny-experiment.yaml", "--set", f"teacher.threads={HUGE}"),
        ("precompute", "--config", "tiny-experiment.yaml", "--set", f"storage.dense_tokens=pca-{HUGE}"),
        ("precompute", "--config", "tiny-experiment.yaml", "--set", f"dataset.ignore_index=[{HUGE}]"),
        ("precompute", "--config", "tiny-experiment.yaml", "--scheduler", f"tcp://localhost:{HUGE}"),
        (*TRAIN, "--seed", HUGE),
        (*TRAIN, "--device", f"cuda:{HUGE}"),
        (*TRAIN, "--set", f"loss.tau={HUGE}{HUGE}.0e+300"),
        ("predict", "data/tiny/images", "--gamma", "nan"),
        ("predict", "data/tiny/images", "--gamma", "1e999"),
        ("inspect-pseudolabels", "--count", HUGE),
        ("inspect-pseudolabels", "--seed", HUGE),
        ("bench", "inference", "--size", HUGE + "2"),
        ("bench", "inference", "--rounds", HUGE),
        ("bench", "inference", "--classes", HUGE),
        ("demo", "--seeds", HUGE),
        ("demo", "--seeds", "-1"),
        ("ablate", "losses", "--seeds", HUGE),
    ],
    ids=lambda command: " ".join(command[:1] + command[-2:])[:60],
)
def test_a_huge_number_in_any_option(world: World, trained: Path, command: tuple[str, ...]) -> None:
    line = world.fails(*command)
    assert "fault" not in line and len(line) < 500


@pytest.mark.parametrize("name", ["cache", "stages"])
def test_a_module_of_ones_own_with_a_name_of_ours(world: World, tmp_path: Path, name: str) -> None:
    """As the installed command is started: the folder of PYTHONPATH comes before where clip-zss is installed."""
    (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong one')\n")
    (tmp_path / "start.py").write_text("from cli import main\nif __name__ == '__main__':\n    main()\n")
    done = subprocess.run(
        [sys.executable, tmp_path / "start.py", *TRAIN, "--run", tmp_path / "run", "--set", "train.workers=1"],
        cwd=world.folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "student.safetensors").exists()


def test_memory_that_is_too_small(world: World, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 99 bytes")):
        monkeypatch.setattr("stages.common.runs.load_run", mock.Mock(side_effect=error))
        assert "memory is too small" in world.fails("evaluate")
