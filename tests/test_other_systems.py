"""The verbs run where everything that only POSIX has is hidden, also in the processes that they start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT

# Python imports `sitecustomize` in every process. On this system two libraries need what is hidden; on Windows they use
# other calls. So they are imported first. filelock falls back on its SoftFileLock.
HIDE = """
import os, signal, sys
import locket, psutil
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
for name in ("fork", "forkpty", "killpg"):
    delattr(os, name)
for name in ("SIGALRM", "alarm", "setitimer"):
    delattr(signal, name)
"""
RUN = """
import sys

import cli
from pipeline.data.scenes import SPLITS

VERBS = (
    "precompute --dataset scenes --runlocal --cache cache --device cpu",
    "train --dataset scenes --runlocal --cache cache --run run --device cpu --set train.workers=1",
    "evaluate --run run --device cpu",
    "predict photo.png --run run --output out --rle --device cpu",
    "export --run run --output exported",
)

if __name__ == "__main__":
    SPLITS.update(train=6, holdout=6, val=6)  # rendering all takes longer than the rest
    for verb in VERBS:
        sys.argv = ["clip-zss", "--debug", *verb.split()]
        try:
            cli.main()
        except SystemExit as done:
            assert not done.code, (verb, done.code)
"""


@pytest.mark.slow
def test_all_verbs_run_without_what_only_posix_has(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    (tmp_path / "run.py").write_text(RUN)
    Image.new("RGB", (40, 30), "green").save(tmp_path / "photo.png")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "photo.png.rle.json").exists() and (tmp_path / "exported" / "model.onnx").exists()
    assert not (tmp_path / "cache" / ".lock").exists() and not (tmp_path / "run" / ".lock").exists()
