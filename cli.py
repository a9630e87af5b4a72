"""The command line: reads options and settings, calls one function in stages/, prints what it returns.

Heavy libraries are imported inside the commands: --help stays fast, and training never loads the teacher's library.
"""

import errno
import os
import sys
import traceback
from contextlib import suppress
from io import TextIOWrapper
from typing import Annotated, Literal

# Before PYTHONPATH, where a cache.py of the user's own would hide the folder cache; workers inherit the order.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
try:
    import typer
except ModuleNotFoundError as missing:
    print(f"error: {missing}: activate the environment where clip-zss is installed, or install it", file=sys.stderr)
    sys.exit(2)

from configs.errors import UserError, reason
from configs.load import named_dataset, resolve
from stages.verbs import bench, caches, datasets, machine, results, studies
from stages.verbs.options import (
    DATA,
    CacheOption,
    ConfigOption,
    DataRootOption,
    DatasetOption,
    DeviceOption,
    OnErrorOption,
    RunlocalOption,
    RunOption,
    SeedOption,
    SetOption,
    device_of,
    open_cache,
    resumable,
    with_flags,
)

app = typer.Typer(
    name="clip-zss",
    help="CLIP-ZSS: train any segmentation encoder to recognise classes it has no masks for, by distilling a frozen "
    "CLIP into it. The trained model runs without CLIP.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_debug = False
os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # the hub's retries, two lines each; workers inherit it


@app.callback(epilog="Exit codes: 0 done; 1 internal error; 2 a mistake in the input; 130 Ctrl-C.")
def options(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
) -> None:
    from stages.common.progress import console

    global _debug
    _debug, console.quiet = debug, quiet


@app.command()
def precompute(
    dataset: DatasetOption = None,
    data_root: DataRootOption = DATA,
    cache: CacheOption = None,
    config: ConfigOption = None,
    set_: SetOption = [],  # noqa: B006 (typer copies it)
    seed: SeedOption = None,
    on_error: OnErrorOption = None,
    runlocal: RunlocalOption = False,
    device: DeviceOption = "auto",
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler", metavar="tcp://HOST:PORT", help="Use this running Dask scheduler; default: start one."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan (views, bytes, time) and stop.")] = False,
    retry_skipped: Annotated[
        bool, typer.Option("--retry-skipped", help="Try the images again that --on-error skip left out.")
    ] = False,
    only: Annotated[
        Literal["pseudo-labels"] | None,
        typer.Option("--only", help="Recompute only the labels, from the dense tokens stored in --cache."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option("--lambda", metavar="X", help="Short for --set pseudo_labels.lambda=X")
    ] = None,
) -> None:
    """Stage one: run the frozen teacher once over the training images and cache its outputs.

    If it is interrupted, the same command continues. Example: clip-zss precompute --dataset scenes --dry-run

    New labels with another lambda, without the teacher: clip-zss precompute --only pseudo-labels --lambda 0.9
    """
    flags = {"views.seed": seed, "precompute.on_error": on_error, "pseudo_labels.lambda": threshold}
    if only:
        from stages.precompute.recluster import recluster

        if scheduler or dry_run or retry_skipped:
            raise UserError(
                "--only pseudo-labels runs in this process, on tokens that are there: drop --scheduler, --dry-run and "
                "--retry-skipped"
            )
        opened, settings = open_cache(cache, dataset, config, with_flags(set_, flags), runlocal)
        with resumable():
            recluster(settings, opened)
        return
    from stages.precompute.stage import precompute as stage

    if retry_skipped and dry_run:
        raise UserError("--retry-skipped changes the cache: drop --dry-run")

    settings = resolve(dataset, config, with_flags(set_, flags), runlocal=runlocal)
    with resumable():  # A cluster's workers choose their own device: this machine may have another.
        on = device if scheduler else device_of(device)
        stage(settings, data_root, cache, on, scheduler, dry_run, retry_skipped)


@app.command()
def train(
    dataset: DatasetOption = None,
    data_root: DataRootOption = DATA,
    cache: CacheOption = None,
    run: RunOption = None,
    config: ConfigOption = None,
    set_: SetOption = [],  # noqa: B006
    seed: SeedOption = None,
    runlocal: RunlocalOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Stage two: train a student on a cache. The teacher is not loaded, unless train.teacher is online or fresh.

    To continue a run that was stopped or killed, pass its folder as --run; its settings and cache are kept. On SIGTERM
    and Ctrl-C, training saves before it exits.

    Example: clip-zss train --seed 1 --set train.iterations=1000 --set loss.bank=16

    Example: clip-zss train --run runs/scenes-001
    """
    from stages.common.caches import choose_cache
    from stages.common.runs import CONFIG, is_begun, read_settings
    from stages.train.provenance import last_cache
    from stages.train.stage import train as stage

    assignments = with_flags(set_, {"train.seed": seed})
    if run and is_begun(run):
        opened = choose_cache(cache or last_cache(run), named_dataset(dataset, config))
        settings = resolve(dataset, config, assignments, read_settings(run), runlocal, str(run / CONFIG))
    else:
        opened, settings = open_cache(cache, dataset, config, assignments, runlocal)
    stage(settings, opened, data_root, run, device_of(device))


for verb in (
    results.evaluate, results.predict, results.export, results.inspect_pseudolabels, studies.demo, studies.ablate,
    machine.runs, machine.doctor,
):  # fmt: skip
    app.command()(verb)
for name, group in (("datasets", datasets), ("cache", caches), ("bench", bench)):
    app.add_typer(group.app, name=name)


def main() -> None:
    """Run the app. Errors are one line on stderr, unless --debug is given."""
    global _debug
    _debug = False
    _take_any_text()
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        text, code = _explain(error)
        with suppress(OSError):
            if _debug:
                traceback.print_exc()
            if text:
                typer.echo(f"error: {' '.join(text.split())}", err=True)
    sys.exit(code)


def _take_any_text() -> None:
    """Characters that the terminal cannot show are escaped; streams that are closed from the start are replaced."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _explain(error: Exception) -> tuple[str, int]:
    """The message for an error, and the exit code."""
    if isinstance(error, typer.TyperException):  # a usage error; empty if a group printed its help
        context = getattr(error, "ctx", None)
        said = error.format_message().rstrip(".")
        return f"{said} (see {context.command_path} --help)" if said and context else said, 2
    # The user cannot fix an OSError without a file name, unless it is about the disk or the output.
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EPIPE):
        return f"{error}: free some space, or choose another disk", 2
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None):
        return str(error), 2
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
        return f"memory is too small ({reason(error)}): lower train.batch_size, views.size or the number asked for", 2
    if isinstance(error, OverflowError):
        return f"a number is too large ({reason(error)}): correct the options, --set and the settings' files", 2
    if isinstance(error, ImportError):
        return f"{error}: install that package, or rename a file of your own that hides it", 2
    return f"internal error: {error} ({type(error).__name__}): for the traceback, run clip-zss --debug ...", 1


if __name__ == "__main__":
    main()
