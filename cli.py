"""The front door: reads flags and a configuration, calls one function in stages/, prints what it returns.

Heavy libraries are imported inside the verbs: help stays quick, and training never loads the teacher's library.
"""

import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from configs.errors import UserError
from configs.load import as_settings, named_dataset, resolve
from configs.schema import Config
from stages.verbs import bench, caches, datasets
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
    add_completion=False,
    pretty_exceptions_enable=False,
)
_debug = False


@app.callback(epilog="Exit codes: 0 done; 1 a fault of this program; 2 a mistake in what it was given; 130 Ctrl-C.")
def options(
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Results and errors only: no news, no progress.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="The whole traceback of an error.")] = False,
) -> None:
    from stages.progress import console

    global _debug
    _debug, console.quiet = debug, quiet


for name, group in (("datasets", datasets), ("cache", caches), ("bench", bench)):
    app.add_typer(group.app, name=name)


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
        from stages.recluster import recluster

        if scheduler or dry_run:
            raise UserError("--only pseudo-labels runs in this process: drop --scheduler and --dry-run")
        opened, settings = open_cache(cache, dataset, config, with_flags(set_, flags), runlocal)
        recluster(settings, opened)
        return
    from stages.precompute import precompute as stage

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
    from stages.caches import choose_cache
    from stages.runs import is_run, read_settings
    from stages.train import train as stage
    from stages.training.provenance import last_cache

    assignments = with_flags(set_, {"train.seed": seed})
    if run and is_run(run):
        opened = choose_cache(cache or last_cache(run), named_dataset(dataset, config))
        settings = resolve(dataset, config, assignments, read_settings(run), runlocal)
    else:
        opened, settings = open_cache(cache, dataset, config, assignments, runlocal)
    stage(settings, opened, data_root, run, device_of(device))


@app.command()
def evaluate(
    dataset: DatasetOption = None,
    data_root: DataRootOption = DATA,
    run: RunOption = None,
    config: ConfigOption = None,
    set_: SetOption = [],  # noqa: B006
    runlocal: RunlocalOption = False,
    device: DeviceOption = "auto",
    teacher_dense: Annotated[
        bool, typer.Option("--teacher-dense", help="Score the teacher's own dense prediction instead.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the scores here too.")] = None,
) -> None:
    """Score a run: pixel accuracy, mIoU of seen and unseen classes, their harmonic mean, IoU of every class.

    Another dataset than the run's is scored by mIoU over all its classes; their names meet the text tower once.

    Example: clip-zss evaluate --dataset pascal-voc --set evaluate.mode=slide --json scores.json
    """
    from stages.evaluate import evaluate as stage
    from stages.evaluate import features_of, student_predictor, teacher_predictor
    from stages.report import score_report, score_table
    from stages.runs import load_run, newest_run

    on = device_of(device)
    if teacher_dense:
        base = None if run is None and (dataset or config) else as_settings(load_run(run or newest_run()).config)
        settings = resolve(dataset, config, set_, base, runlocal)
        name, predict = "teacher's dense tokens", teacher_predictor(settings, on)
    else:
        opened = load_run(run or newest_run(), on)
        settings = resolve(dataset, config, set_, as_settings(opened.config), runlocal)
        settings, features = features_of(settings, opened, on)
        name, predict = (
            f"{opened.path} (iteration {opened.iteration})",
            student_predictor(opened.student, features, settings),
        )
    gamma, scores = stage(predict, settings, data_root)
    score_table(name, settings, gamma, scores)
    if json_file:
        json_file.write_text(json.dumps(score_report(name, settings, gamma, scores), indent=2, allow_nan=False) + "\n")


@app.command()
def predict(
    photos: Annotated[list[Path], typer.Argument(metavar="PHOTO...", help="Photos, or folders of photos.")],
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes",
            metavar="WORDS|FILE",
            help="Words, with commas between, synonyms by |; or a text file, a class a line. Default: as trained.",
        ),
    ] = None,
    run: RunOption = None,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Where results go.")] = Path("predictions"),
    gamma: Annotated[
        float | None,
        typer.Option("--gamma", help="Subtracted from seen classes' logits; default: that of the run."),
    ] = None,
    rle: Annotated[bool, typer.Option("--rle", help="COCO run lengths as JSON too.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="CLIP's own dense prediction beside; loads CLIP.")] = False,
    attention: Annotated[
        bool, typer.Option("--attention", help="What GLM attends to for CLIP's CLS token; loads CLIP.")
    ] = False,
    device: DeviceOption = "auto",
) -> None:
    """Segment your own photos by your own words: an overlay with a legend and a mask of class indices for each.

    Classes of the training need no CLIP; new words meet its text tower once. Photos of any kind and size.

    Example: clip-zss predict holiday/ --classes "cow|bull|calf, grass, sky" --output found
    """
    from stages.predict import Segmenter
    from stages.predict import predict as stage
    from stages.runs import newest_run
    from stages.words import read_words

    segmenter = Segmenter.load(run or newest_run(), device_of(device), gamma)
    failures = stage(segmenter, photos, read_words(classes) if classes else None, output, rle, compare, attention)
    for line in failures:
        typer.echo(f"left out: {line}", err=True)
    typer.echo(f"results: {output}")
    if failures:
        raise UserError(f"{len(failures)} photos could not be read, listed above: replace them; the others are done")


@app.command()
def export(
    run: RunOption = None,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="A new folder.")] = Path("exported"),
    precision: Annotated[
        Literal["fp32", "fp16"], typer.Option("--precision", help="Of weights and sums; not of inputs and logits.")
    ] = "fp32",
) -> None:
    """Take a run away: ONNX and torch.export programs, checked, with weights, class features and a model card.

    Class features are an input, so that words can change. Needs the extra `export` of clip-zss.

    Example: clip-zss export --run runs/scenes-001 --output my-model
    """
    from stages.export import export as stage
    from stages.runs import load_run, newest_run

    for name, difference in stage(load_run(run or newest_run()), output, precision).items():
        typer.echo(f"{output / name}: within {difference:.1e} of the student's largest logit")


@app.command("inspect-pseudolabels")
def inspect_pseudolabels(
    dataset: DatasetOption = None,
    data_root: DataRootOption = DATA,
    cache: CacheOption = None,
    set_: SetOption = [],  # noqa: B006
    seed: SeedOption = None,
    image: Annotated[
        list[str], typer.Option("--image", metavar="ID", help="Image to show; repeatable. Default: random ones.")
    ] = [],  # noqa: B006
    count: Annotated[
        int | None,
        typer.Option("--count", min=1, help="How many random images; default: 200, of --terminal and --png 8."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Where the gallery goes.")] = Path(
        "pseudo-labels"
    ),
    terminal: Annotated[bool, typer.Option("--terminal", help="Print the table instead.")] = False,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FILE.png", help="Write a picture of a few images instead.")
    ] = None,
) -> None:
    """Show what stage one found: a gallery for the browser, of regions, fused groups and masks. It needs no network.

    Where the cache holds dense tokens (--set storage.dense_tokens=float16), it fuses at any lambda and names groups.

    Example: clip-zss inspect-pseudolabels --count 500 --output gallery
    """
    from stages.inspect import choose_rows, sheet, table
    from stages.report import pseudo_label_table

    if png and png.suffix.lower() != ".png":
        raise UserError(f"--png {png}: give a name that ends in .png")
    opened, settings = open_cache(cache, dataset, None, set_)
    rows = choose_rows(opened, image, count or (8 if terminal or png else 200), seed or 0)
    if terminal:
        pseudo_label_table(table(settings, opened, data_root, rows))
    if png:
        typer.echo(f"picture: {sheet(settings, opened, data_root, rows, png)}")
    if not terminal and not png:
        from stages.gallery import make_gallery

        typer.echo(f"gallery: {make_gallery(settings, opened, data_root, rows, output)}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Where tables and pictures go.")] = Path(
        "demo"
    ),
    seeds: Annotated[str, typer.Option("--seeds", help="Training seeds, separated by commas.")] = "0",
    set_: SetOption = [],  # noqa: B006
    device: DeviceOption = "auto",
) -> None:
    """The whole pipeline on the embedded dataset, with and without GLM, and the table of results.

    Example: clip-zss demo --seeds 0,1,2 --output benchmarks
    """
    from stages.demo import demo as stage

    try:
        chosen = [int(seed) for seed in seeds.split(",")]
    except ValueError as error:
        raise UserError(f"--seeds {seeds}: write numbers separated by commas") from error
    stage(output, chosen, set_, device_of(device))


@app.command()
def ablate(
    table: Annotated[str, typer.Argument(metavar="TABLE|FILE.yaml", help="A table of configs/ablations, or your own.")],
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many training seeds, from 0 on.")] = 3,
    dataset: DatasetOption = None,
    config: ConfigOption = None,
    data_root: DataRootOption = DATA,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Where CSV, table and plot go.")] = Path(
        "ablations"
    ),
    device: DeviceOption = "auto",
) -> None:
    """Train and score every row of a table, and say which of the paper's claims hold. Goes on where it was stopped.

    Example: clip-zss ablate losses --seeds 3 --output benchmarks/ablations
    """
    from configs.ablation import read_ablation
    from stages.ablate import ablate as stage

    name, content = read_ablation(table)
    command = f"clip-zss ablate {table} --seeds {seeds}"
    command += "".join(f" {flag} {value}" for flag, value in (("--dataset", dataset), ("--config", config)) if value)

    def settings_of(assignments: Sequence[str]) -> Config:
        return resolve(dataset, config, assignments)

    with resumable():
        files = stage(name, content, seeds, settings_of, command, data_root, output, device_of(device))
    for file in files:
        typer.echo(f"written: {file}")


def main() -> None:
    """Runs the app; a mistake or a fault is one line on stderr, unless --debug is given."""
    global _debug
    _debug = False
    try:
        app()
    except Exception as error:
        if _debug:
            traceback.print_exc()
        # An error without a file is not about one that the user could mend.
        mistake = isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None)
        text = " ".join(str(error).split())
        hint = (
            "" if mistake else f" ({type(error).__name__}, a fault of clip-zss: see it whole by clip-zss --debug ...)"
        )
        typer.echo(f"error: {text}{hint}", err=True)
        sys.exit(2 if mistake else 1)


if __name__ == "__main__":
    main()
