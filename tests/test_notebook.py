"""docs/quickstart.ipynb, run as Jupyter runs it."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


@pytest.mark.slow
def test_the_quickstart_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command succeeds, and both pictures are shown; the committed file has both, too."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert pictures(notebook) == 2
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "labels.png" in said and "runs/quick (iteration 6 of 6)" in said
    assert "error:" not in said and pictures(notebook) == 2


def pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return sum("image/png" in output.get("data", {}) for output in outputs)
