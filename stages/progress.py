"""What the stages print: one line at a time, and progress bars with rate and time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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

console = Console(stderr=True)
output = Console(soft_wrap=True)


def say(line: str) -> None:
    """One line of news, to stderr; results go to stdout by `output`."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        if (not task.finished and task.speed is None) or task.total is None:
            return Text("")
        speed = task.finished_speed or task.speed or 0
        return Text(f"{speed:.1f} {task.fields['unit']}/s")


@contextmanager
def progress_bar(name: str, total: int | None = None, unit: str = "") -> Iterator[Callable[..., None]]:
    """A bar on stderr. The yielded function advances it: `advance(count, note="...")`."""
    columns = (
        SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), MofNCompleteColumn(),
        _Rate(), TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=total, unit=unit, note="")

        def advance(count: int = 1, note: str | None = None) -> None:
            bar.update(task, advance=count)
            if note is not None:
                bar.update(task, note=note)

        yield advance
