"""benchmarks/gpu.py, rehearsed on the CPU."""

from pathlib import Path

import pytest

from benchmarks import gpu


@pytest.mark.slow
def test_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part has its table, each with a figure beside that of the bare model; nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    assert gpu.main(["--device", "cpu", "--tiny"]) == 0
    page = capsys.readouterr().out
    for part in ("Agreement", "Stage one", "Training steps", "The teacher online or cached", "Inference"):
        rows = [line for line in page.partition(f"## {part}\n\n")[2].partition("##")[0].splitlines() if line]
        assert len(rows) >= 3 and all(row.count("|") == rows[0].count("|") for row in rows), page
    assert "NO" not in page.partition("## Stage one")[0] and not list(tmp_path.iterdir())
