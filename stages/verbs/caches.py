"""The commands of `clip-zss cache`."""

from dataclasses import asdict
from typing import Annotated

import typer

from configs.errors import UserError
from stages.verbs.options import (
    DATA,
    DataRootOption,
    DeviceOption,
    JsonOption,
    device_of,
    print_result,
    resumable,
)

app = typer.Typer(no_args_is_help=True, help="Inspect, verify and repair a cache.")
LocationArgument = Annotated[str, typer.Argument(metavar="CACHE", help="Cache folder or URL.")]


@app.command("info")
def cache_info(location: LocationArgument, json_file: JsonOption = None) -> None:
    """Show what a cache was made from, how much of it is done, and its size.

    Example: clip-zss cache info caches/scenes-1a2b3c4d5e6f
    """
    from cache.verify import info
    from stages.verbs.report import cache_report, cache_table

    found = info(location)
    print_result(lambda: cache_table(found), cache_report(found), json_file)


@app.command("verify")
def cache_verify(location: LocationArgument, json_file: JsonOption = None) -> None:
    """Reread every byte and list each file that is missing, changed, or not listed in any record (stray).

    The exit code is 2 if anything is damaged. Example: clip-zss cache verify caches/scenes-1a2b3c4d5e6f
    """
    from cache.verify import verify
    from stages.verbs.report import damage_list

    found = verify(location)
    print_result(lambda: damage_list(found), [asdict(damage) for damage in found], json_file)
    damaged = sum(damage.kind != "stray" for damage in found)
    if damaged:
        raise UserError(f"{location}: {damaged} files are damaged, listed above: run `cache repair {location}`")


@app.command("repair")
def cache_repair(location: LocationArgument, data_root: DataRootOption = DATA, device: DeviceOption = "auto") -> None:
    """Restore small files from their copies, and recompute only the damaged or missing shards.

    Example: clip-zss cache repair caches/scenes-1a2b3c4d5e6f --data-root ~/data
    """
    from stages.precompute.repair import repair
    from stages.verbs.report import damage_list

    with resumable():
        damage_list(repair(location, data_root, device_of(device)))


@app.command("gc")
def cache_gc(location: LocationArgument) -> None:
    """Delete what killed runs left behind: temporary files and files of unfinished shards.

    Example: clip-zss cache gc caches/scenes-1a2b3c4d5e6f
    """
    from cache.verify import gc

    deleted, freed = gc(location)
    for path in deleted:
        typer.echo(f"deleted: {path}")
    typer.echo(f"{len(deleted)} files, {freed:,} bytes freed")
