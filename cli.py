"""The front door: reads flags and a configuration, calls one function in stages/, prints what it returns.

Heavy libraries are imported inside the verbs: help stays quick, and training never loads the teacher's library.
"""

import io
import os
import sys
import traceback
from typing import Annotated, Literal

try:
    import typer
except ModuleNotFoundError as missing:
    print(f"error: {missing}: activate the environment that holds clip-zss, or install it", file=sys.stderr)
    sys.exit(2)

from configs.errors import UserError
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
    help="CLIP-ZSS: any closed-set segmentation encoder learns, from a frozen CLIP, to segment classes it never saw a "
    "mask of, and then runs without CLIP.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_debug = False
os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # the hub's retries, two lines each; workers inherit it


@app.callback(epilog="Exit codes: 0 done; 1 a fault of this program; 2 a mistake in what it was given; 130 Ctrl-C.")
def options(
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Results and errors only: no news, no progress.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="The whole traceback of an error.")] = False,
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
        typer.Option("--scheduler", metavar="tcp://HOST:PORT", help="A running Dask scheduler; default: start one."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan (views, bytes, time) and stop.")] = False,
    only: Annotated[
        Literal["pseudo-labels"] | None,
        typer.Option("--only", help="Labels alone, from the dense tokens of --cache (default: the newest)."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option("--lambda", metavar="X", help="Short for --set pseudo_labels.lambda=X.")
    ] = None,
) -> None:
    """Stage one: run the frozen teacher once over the training images and cache what it says.

    Killed at any moment, it is continued by the same command. Example: clip-zss precompute --dataset scenes --dry-run

    Labels by another lambda, without the teacher: clip-zss precompute --only pseudo-labels --lambda 0.9
    """
    flags = {"views.seed": seed, "precompute.on_error": on_error, "pseudo_labels.lambda": threshold}
    if only:
        from stages.precompute.recluster import recluster

        if scheduler or dry_run:
            raise UserError("--only pseudo-labels runs in this process: drop --scheduler and --dry-run")
        opened, settings = open_cache(cache, dataset, config, with_flags(set_, flags), runlocal)
        with resumable():
            recluster(settings, opened)
        return
    from stages.precompute.stage import precompute as stage

    settings = resolve(dataset, config, with_flags(set_, flags), runlocal=runlocal)
    with resumable():  # A cluster's workers choose their own device: this machine may have another.
        stage(settings, data_root, cache, device if scheduler else device_of(device), scheduler, dry_run)


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
    """Stage two: train a student against a cache. The teacher is not loaded, unless train.teacher is online or fresh.

    Killed at any moment, a run is continued by --run and its folder, with its own settings and cache. SIGTERM and
    Ctrl-C save it first.

    Example: clip-zss train --seed 1 --set train.iterations=1000 --set loss.bank=16

    Example: clip-zss train --run runs/scenes-001
    """
    from stages.common.caches import choose_cache
    from stages.common.runs import CONFIG, is_run, read_settings
    from stages.train.provenance import last_cache
    from stages.train.stage import train as stage

    assignments = with_flags(set_, {"train.seed": seed})
    if run and is_run(run):
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
    """Runs the app; a mistake or a fault is one line on stderr, unless --debug is given."""
    global _debug
    _debug = False
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be no text
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        if _debug:
            traceback.print_exc()
        text, code = _last_words(error)
        if text:
            typer.echo(f"error: {' '.join(text.split())}", err=True)
    sys.exit(code)


def _last_words(error: Exception) -> tuple[str, int]:
    """What is said of an error, and the exit code."""
    if isinstance(error, typer.TyperException):  # the command line's; empty of a group alone, whose help is shown
        context = getattr(error, "ctx", None)
        said = error.format_message().rstrip(".")
        return f"{said} (see {context.command_path} --help)" if said and context else said, 2
    # An error without a file is not about one that the user could mend.
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None):
        return str(error), 2
    return f"{error} ({type(error).__name__}, a fault of clip-zss: see it whole by clip-zss --debug ...)", 1


if __name__ == "__main__":
    main()
