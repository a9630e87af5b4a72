"""Options shared by several commands, and what they mean."""

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
    """Reject a file that could not be written, before any work is done."""
    if json_file and not json_file.absolute().parent.is_dir():
        raise UserError(f"--json {json_file}: there is no folder {json_file.parent}, make it first")
    if json_file and json_file.is_dir():
        raise UserError(f"--json {json_file} is a folder: name a file in it")
    return json_file


DatasetOption = Annotated[
    str | None,
    typer.Option(
        "--dataset", metavar="NAME|FILE.yaml", help="Dataset; default: that of the cache or run, otherwise scenes."
    ),
]
DataRootOption = Annotated[Path, typer.Option("--data-root", metavar="DIR", help="Folder that contains the datasets.")]
CacheOption = Annotated[
    str | None,
    typer.Option(
        "--cache",
        metavar="DIR|URL",
        help="Cache folder or URL; default: the newest in caches/; for precompute, one named after its settings.",
    ),
]
RunOption = Annotated[
    Path | None,
    typer.Option("--run", metavar="DIR", help="Run folder; default: the newest; for train, a new one in runs/."),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE.yaml", help="Settings file; default: configs/experiments/DATASET.yaml."),
]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change one setting; repeatable.")
]
OnErrorOption = Annotated[
    Literal["stop", "skip"] | None,
    typer.Option("--on-error", help="What to do if an image cannot be read; default: stop."),
]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, max=2**32 - 1, help="Random seed.")]
RunlocalOption = Annotated[
    bool, typer.Option("--runlocal", help="Try it on a CPU in two minutes: a few small images, few iterations.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps (the GPU of a Mac).")]
JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Also write the result as JSON; - prints JSON instead of the table.",
        callback=check_json,
    ),
]
DATA = Path("data")
STDOUT = Path("-")


def print_result(table: Callable[[], None], data: Any, json_file: Path | None) -> None:
    """Write a result as JSON if requested, with NaN as null, then print it as a table by calling `table`.

    The file comes first: printing may fail.
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
    """On Ctrl-C, print how to continue and exit with code 130, as shells do."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("stopped: run the same command to continue", err=True)
        raise SystemExit(130) from None


def with_flags(assignments: list[str], flags: dict[str, Any]) -> list[str]:
    """`assignments` after those of the flags, so that --set overrides a flag."""
    return [*(f"{key}={value}" for key, value in flags.items() if value is not None), *assignments]


def device_of(asked: str) -> str:
    from stages.common.devices import choose_device, keep_freed_memory

    keep_freed_memory()
    return choose_device(asked)


def open_cache(
    cache: str | None, dataset: str | None, config: Path | None, assignments: list[str], runlocal: bool = False
) -> tuple[Any, Config]:
    """The cache a command works on, and the configuration: the cache's settings, overridden by the command's."""
    from stages.common.caches import cached_settings, choose_cache

    opened = choose_cache(cache, named_dataset(dataset, config))
    settings, name = cached_settings(opened.manifest), f"cache {opened.location}"
    return opened, resolve(dataset, config, assignments, settings, runlocal, name)
