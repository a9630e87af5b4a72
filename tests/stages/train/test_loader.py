"""Whatever ends a loader's worker is one line with the cure, soon; the steps before it are saved."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.train import batches
from stages.upkeep import doctor
from tests.conftest import ROOT, World

LATE = """
import os, signal, time
from pipeline.data.training import TrainingViews
read = TrainingViews.__getitem__
def late(self, draw):
    if draw >= 24 and signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in a worker
        END
    return read(self, draw)
TrainingViews.__getitem__ = late
"""
CURE = "docker run --shm-size 8g"


def train(world: World, run: Path, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = (
        f"{before} {sys.executable} {ROOT / 'cli.py'} train --cache caches/tiny --config {world.config} --run {run}"
    )
    return subprocess.run(
        ["bash", "-c", f"{command} --set train.workers=2 --set train.iterations=99"], cwd=world.folder,
        capture_output=True, text=True, timeout=300, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGBUS)", "was killed by SIGBUS"),
        ("os._exit(3)", "exited unexpectedly"),
        ("raise RuntimeError('unable to allocate shared memory(shm)')", "unable to allocate shared memory(shm)"),
        ("raise OSError(24, 'Too many open files')", "Too many open files"),
        ("raise MemoryError('no more')", "no more"),
    ],
)
def test_a_workers_end_is_one_line_and_the_steps_are_saved(
    world: World, trained: Path, tmp_path: Path, end: str, said: str
) -> None:
    """Workers are processes that begin anew: they find this in a module that Python imports by itself."""
    (tmp_path / "sitecustomize.py").write_text(LATE.replace("END", end))
    done = train(world, tmp_path / "run", PYTHONPATH=f"{tmp_path}:{ROOT}")
    ended = time.time()
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert said in lines[0] and CURE in lines[0] and "train.workers=0" in lines[0] and len(lines[0]) < 600
    checkpoints = list((tmp_path / "run" / "checkpoints").iterdir())
    saved = [int(folder.name) for folder in checkpoints]
    assert f"saved after iteration {max(saved)}: to continue, run train --run {tmp_path / 'run'}" in lines[0]
    assert ended - max(folder.stat().st_mtime for folder in checkpoints) < 40  # workers outlive a SIGTERM by a minute


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs a mount of its own")
def test_little_shared_memory_is_refused_before_the_first_step(world: World, trained: Path, tmp_path: Path) -> None:
    """As Docker's 64 MB, for batches of 4 x 64 x 64."""
    small = "unshare -m bash -c 'mount -t tmpfs -o size=128k tmpfs /dev/shm && exec \"$@\"' --"
    if subprocess.run(["bash", "-c", f"{small} true"], capture_output=True).returncode:
        pytest.skip("/dev/shm cannot be mounted here")
    done = train(world, tmp_path / "run", small)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "error: /dev/shm has 0 MiB free, but 2 train.workers need" in done.stderr
    assert CURE in done.stderr and "train.workers; 0 needs none" in done.stderr


def test_doctor_looks_at_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def found() -> doctor.Finding:
        return next(item for item in doctor.doctor("cpu") if item.part == "shared memory")

    assert not found().fault
    monkeypatch.setattr(batches.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**26, 0, 2**26))
    assert found().fault and CURE in found().text and "has 64 MiB free" in found().text
    monkeypatch.setattr(batches, "SHARED", tmp_path / "none")  # as on a Mac
    assert not found().fault
