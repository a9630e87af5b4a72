"""The short form of benchmarks/kills.py, on the world's few images."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, World


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_killed_and_resumed_is_whole(world: World, tmp_path, seed: int) -> None:
    arguments = ["--config", world.config, "--data-root", world.data, "--set", "storage.shard_images=1"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "kills.py", "--kills", "3", "--seed", str(seed), "--", *arguments],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3  kills" in done.stdout and "byte-identical" in done.stdout
