"""Output of the stages: single lines, and progress bars with rate and remaining time."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from configs.errors import UserError

LINE_EVERY = 30  # seconds


class _Screen(Console):
    """If its reader goes away (`head`) or stderr cannot be written, printing stops and the work goes on."""

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError as error:
            self.on_broken_pipe()
            if not self.stderr:
                raise UserError(
                    f"cannot write the results to stdout ({error.strerror}): redirect them to a file"
                ) from error

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with suppress(OSError, ValueError):  # or Python would try to flush the buffer again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


console = _Screen(stderr=True)
output = _Screen(soft_wrap=True)


def say(line: str) -> None:
    """Print one line of news to stderr."""
    console.print(Text(line), soft_wrap=True)


def show(line: str) -> None:
    """Print one line of results to stdout, literally: names may contain what Rich would read as markup."""
    output.print(Text(line))


def figure(value: float, style: str = ".1f") -> str:
    """A number as text; a dash for NaN."""
    return "-" if math.isnan(value) else format(value, style)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        if (not task.finished and task.speed is None) or task.total is None:
            return Text("")
        speed = task.finished_speed or task.speed or 0
        return Text(f"{speed:.1f} {task.fields['unit']}/s")


class _Lines:
    """Progress for a log file."""

    def __init__(self, name: str, total: int | None, unit: str, done: int) -> None:
        self._name, self._total, self._unit, self._done = name, total, unit, done
        self._new, self._note = 0, ""
        self._said = self._started = time.monotonic()
        if total is None:
            say(name)

    def __call__(self, count: int = 1, note: str | None = None) -> None:
        self._done, self._new = self._done + count, self._new + count
        self._note = self._note if note is None else note
        now = time.monotonic()
        if now - self._said >= LINE_EVERY and self._total and self._new:
            rate = self._new / (now - self._said)
            left = (self._total - self._done) / rate / 60
            say(
                f"{self._name} {self._done:,} of {self._total:,} {self._unit}, {rate:.1f} {self._unit}/s, "
                f"{left:.0f} minutes left" + (f", {self._note}" if self._note else "")
            )
            self._new, self._said = 0, now

    def end(self) -> None:
        if self._total is not None:
            say(f"{self._name}: {self._done:,} {self._unit}, {time.monotonic() - self._started:.0f} s")


@contextmanager
def progress_bar(name: str, total: int | None = None, unit: str = "", done: int = 0) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr; if that is not a terminal, a line every 30 s and one at the end.

    The yielded function advances it: `advance(count, note="...")`.
    """
    if not console.is_terminal:
        lines = _Lines(name, total, unit, done)
        yield lines
        lines.end()
        return
    columns = (
        SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), MofNCompleteColumn(),
        _Rate(), TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=total, completed=done, unit=unit, note="")

        def advance(count: int = 1, note: str | None = None) -> None:
            bar.update(task, advance=count)
            if note is not None:
                bar.update(task, note=note)

        yield advance
