"""Options that several verbs share, and what they mean."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from configs.errors import UserError, writing
from configs.load import named_dataset, resolve
from configs.schema import Config
from stages.common.progress import show


def check_json(json_file: Path | None) -> Path | None:
    """Refuses, before the work, a file that could not be written after it."""
    if json_file and not json_file.absolute().parent.is_dir():
        raise UserError(f"--json {json_file}: there is no folder {json_file.parent}, make it first")
    if json_file and json_file.is_dir():
        raise UserError(f"--json {json_file} is a folder: name a file in it")
    return json_file


DatasetOption = Annotated[
    str | None,
    typer.Option(
        "--dataset", metavar="NAME|FILE.yaml", help="Dataset; default: that of the cache or run, else scenes."
    ),
]
DataRootOption = Annotated[Path, typer.Option("--data-root", metavar="DIR", help="Folder that holds the datasets.")]
CacheOption = Annotated[
    str | None,
    typer.Option(
        "--cache",
        metavar="DIR|URL",
        help="Cache, a folder or s3://...; default: named by its settings (precompute), else the newest below caches/.",
    ),
]
RunOption = Annotated[
    Path | None,
    typer.Option("--run", metavar="DIR", help="Run; default: a new one below runs/ (train), else the newest."),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE.yaml", help="Settings; default: configs/experiments/DATASET.yaml."),
]
SetOption = Annotated[list[str], typer.Option("--set", metavar="KEY.PATH=VALUE", help="One setting; repeatable.")]
OnErrorOption = Annotated[
    Literal["stop", "skip"] | None,
    typer.Option("--on-error", help="What to do at an image that cannot be read; default: stop."),
]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of this stage.")]
RunlocalOption = Annotated[
    bool, typer.Option("--runlocal", help="A few small images and iterations: two minutes on a CPU, to try things.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="The same as JSON; - prints it, in place of the table.", callback=check_json
    ),
]
DATA = Path("data")
STDOUT = Path("-")


def print_result(table: Callable[[], None], data: Any, json_file: Path | None) -> None:
    """What a verb found: where asked for as JSON, in which NaN is null, and, by `table`, as a table.

    The file first: a screen may not take what it is shown.
    """
    if json_file:
        plain = json.loads(json.dumps(data), parse_constant=lambda _: None)
        text = json.dumps(plain, indent=2)
        if json_file == STDOUT:
            show(text)
            return
        if json_file.is_symlink() or (json_file.exists() and not json_file.is_file()):  # such as /dev/stdout
            with writing(json_file):
                json_file.write_text(text + "\n")
        else:
            from stages.common.runs import replace_file

            replace_file(json_file, lambda aside: aside.write_text(text + "\n"))
    table()


@contextmanager
def resumable() -> Iterator[None]:
    """Ctrl-C ends the block with a line that says how to go on, and exit code 130, as shells have it."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("stopped: the same command goes on from here", err=True)
        raise SystemExit(130) from None


def with_flags(assignments: list[str], flags: dict[str, Any]) -> list[str]:
    """Flags that are short for a setting come before `--set`, which is the more precise."""
    return [*(f"{key}={value}" for key, value in flags.items() if value is not None), *assignments]


def device_of(asked: str) -> str:
    from stages.common.devices import choose_device, keep_freed_memory

    keep_freed_memory()
    return choose_device(asked)


def open_cache(
    cache: str | None, dataset: str | None, config: Path | None, assignments: list[str], runlocal: bool = False
) -> tuple[Any, Config]:
    """The cache a command works on, and the configuration: the cache's settings under those that are asked for."""
    from stages.common.caches import cached_settings, choose_cache

    opened = choose_cache(cache, named_dataset(dataset, config))
    settings, name = cached_settings(opened.manifest), f"cache {opened.location}"
    return opened, resolve(dataset, config, assignments, settings, runlocal, name)
