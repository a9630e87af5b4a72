"""The verbs of `clip-zss cache`."""

from dataclasses import asdict
from typing import Annotated

import typer

from configs.errors import UserError
from stages.common.progress import show
from stages.verbs.options import (
    DATA,
    DataRootOption,
    DeviceOption,
    JsonOption,
    device_of,
    print_result,
    resumable,
)

app = typer.Typer(
    no_args_is_help=True, help="What a cache holds, whether every byte of it is as it was written, and how to mend it."
)
LocationArgument = Annotated[str, typer.Argument(metavar="CACHE", help="Its folder or URL.")]


@app.command("info")
def cache_info(location: LocationArgument, json_file: JsonOption = None) -> None:
    """What it was made from, how much of it is done, and its size.

    Example: clip-zss cache info caches/scenes-1a2b3c4d5e6f
    """
    from cache.verify import info
    from stages.verbs.report import cache_report, cache_table

    found = info(location)
    print_result(lambda: cache_table(found), cache_report(found), json_file)


@app.command("verify")
def cache_verify(location: LocationArgument, json_file: JsonOption = None) -> None:
    """Read every byte again and name each file that is missing or changed, or that nothing vouches for.

    Exit code 2 on damage, and where training could not use the cache.

    Example: clip-zss cache verify caches/scenes-1a2b3c4d5e6f
    """
    from cache.reader import open_cache
    from cache.verify import verify
    from stages.verbs.report import damage_list

    found = verify(location)
    print_result(lambda: damage_list(found), [asdict(damage) for damage in found], json_file)
    damaged = sum(damage.kind != "stray" for damage in found)
    if damaged:
        raise UserError(f"{location}: {damaged} files are damaged, listed above: run `cache repair {location}`")
    open_cache(location)  # says what else keeps training from it


@app.command("repair")
def cache_repair(
    location: LocationArgument,
    data_root: DataRootOption = DATA,
    device: DeviceOption = "auto",
    lender: Annotated[
        str | None,
        typer.Option("--lender", metavar="DIR|URL", help="New place of the cache whose tokens this one shares."),
    ] = None,
) -> None:
    """Restore small files from their copies, and recompute the shards that are damaged or missing, and only those.

    Example: clip-zss cache repair caches/scenes-1a2b3c4d5e6f --data-root ~/data
    """
    from stages.precompute.repair import repair
    from stages.verbs.report import damage_list

    with resumable():
        damage_list(repair(location, data_root, device_of(device), lender))


@app.command("gc")
def cache_gc(location: LocationArgument) -> None:
    """Delete what kills left behind: temporary files, and files of shards that never were completed.

    Example: clip-zss cache gc caches/scenes-1a2b3c4d5e6f
    """
    from cache.verify import gc

    deleted, freed = gc(location)
    for path in deleted:
        show(f"deleted: {path}")
    show(f"{len(deleted)} files, {freed:,} bytes freed")
