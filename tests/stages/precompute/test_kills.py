"""The short form of benchmarks/kills.py, on the world's few images."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, World


def kill(world: World, folder: Path, *options: str) -> str:
    """What the script says of runs with one image a shard, started as users do.

    Not forked: a fork of a process with threads hangs now and then, and an orphan that hangs is what must not be.
    """
    precompute = ["--config", world.config, "--data-root", world.data, "--set", "storage.shard_images=1"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "kills.py", "--spawn", *options, "--", *precompute], cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "byte-identical" in done.stdout
    return done.stdout


@pytest.mark.slow
def test_what_is_killed_and_resumed_is_whole(world: World, tmp_path: Path) -> None:
    assert "3  kills" in kill(world, tmp_path, "--kills", "3")


@pytest.mark.slow
def test_a_run_that_loses_a_worker_completes(world: World, tmp_path: Path) -> None:
    """On a busy machine some are completed before the kill; the one that is hit must be too, or the script fails."""
    said = kill(world, tmp_path, "--kills", "1", "--seed", "3", "--hit", "a worker")
    assert "1  a worker, " in said and "runs completed" in said and "gave up" not in said
