"""Options that several verbs share, and what they mean."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from configs.load import named_dataset, resolve
from configs.schema import Config

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
DATA = Path("data")


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
    from stages.devices import choose_device, keep_freed_memory

    keep_freed_memory()
    return choose_device(asked)


def open_cache(
    cache: str | None, dataset: str | None, config: Path | None, assignments: list[str], runlocal: bool = False
) -> tuple[Any, Config]:
    """The cache a command works on, and the configuration: the cache's settings under those that are asked for."""
    from stages.caches import cached_settings, choose_cache

    opened = choose_cache(cache, named_dataset(dataset, config))
    return opened, resolve(dataset, config, assignments, cached_settings(opened.manifest), runlocal)
