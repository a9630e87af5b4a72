"""Progress where nobody watches a terminal: lines that a log file can hold."""

import pytest

from stages.common import progress
from stages.common.progress import console, progress_bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, for a test to set."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    assert not console.is_terminal
    return now


def test_a_line_every_half_a_minute_and_one_at_the_end(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("train", 400, "it", 100) as advance:  # a run that goes on after iteration 100
        for _ in range(90):
            clock[0] += 0.5
            advance(1, f"loss {clock[0]:.0f}")
        clock[0] += 285
        advance(0)
        clock[0] += 30
        advance(0)  # nothing came of this half a minute
        advance(210)
    assert capsys.readouterr().err.splitlines() == [
        "train 160 of 400 it, 2.0 it/s, 2 minutes left, loss 130",
        "train 190 of 400 it, 0.1 it/s, 35 minutes left, loss 145",
        "train 400 of 400 it, 7.0 it/s, 0 minutes left, loss 145",
        "train: 400 it, 360 s",
    ]


def test_what_has_no_count_is_named(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("loading the teacher") as advance:
        clock[0] += 99
        advance()
    assert capsys.readouterr().err == "loading the teacher\n"


def test_quiet(clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "quiet", True)
    with progress_bar("train", 2, "it") as advance:
        clock[0] += 99
        advance()
    assert not capsys.readouterr().err


def test_a_failure_is_no_end(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), progress_bar("train", 2, "it"):
        raise KeyError
    assert not capsys.readouterr().err
