"""The front door: reads flags and a configuration, calls one function in stages/, prints what it returns.

Heavy libraries are imported inside the verbs: help stays quick, and training never loads the teacher's library.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from configs.errors import UserError
from configs.load import as_settings, named_dataset, resolve
from configs.schema import Config

app = typer.Typer(
    name="clip-zss",
    help="CLIP-ZSS: any closed-set segmentation encoder learns, from a frozen CLIP, to segment classes it never saw a "
    "mask of, and then runs without CLIP.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

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


def _with_flags(assignments: list[str], flags: dict[str, Any]) -> list[str]:
    """Flags that are short for a setting come before `--set`, which is the more precise."""
    return [*(f"{key}={value}" for key, value in flags.items() if value is not None), *assignments]


def _device(asked: str) -> str:
    from stages.devices import choose_device, keep_freed_memory

    keep_freed_memory()
    return choose_device(asked)


def _open_cache(
    cache: str | None, dataset: str | None, config: Path | None, assignments: list[str], runlocal: bool = False
) -> tuple[Any, Config]:
    """The cache a command works on, and the configuration: the cache's settings under those that are asked for."""
    from stages.caches import cached_settings, choose_cache

    opened = choose_cache(cache, named_dataset(dataset, config))
    return opened, resolve(dataset, config, assignments, cached_settings(opened.manifest), runlocal)


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
        opened, settings = _open_cache(cache, dataset, config, _with_flags(set_, flags), runlocal)
        recluster(settings, opened)
        return
    from stages.precompute import precompute as stage

    settings = resolve(dataset, config, _with_flags(set_, flags), runlocal=runlocal)
    # A cluster's workers choose their own device: this machine may have another.
    stage(settings, data_root, cache, device if scheduler else _device(device), scheduler, dry_run)


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
    """Stage two: train a student against a cache. The teacher is not loaded.

    Killed at any moment, a run is continued by --run and its folder, with its own settings and cache. SIGTERM and
    Ctrl-C save it first.

    Example: clip-zss train --seed 1 --set train.iterations=1000 --set loss.bank=16

    Example: clip-zss train --run runs/scenes-001
    """
    from stages.caches import choose_cache
    from stages.runs import is_run, read_settings
    from stages.train import train as stage
    from stages.training.provenance import last_cache

    assignments = _with_flags(set_, {"train.seed": seed})
    if run and is_run(run):
        opened = choose_cache(cache or last_cache(run), named_dataset(dataset, config))
        settings = resolve(dataset, config, assignments, read_settings(run), runlocal)
    else:
        opened, settings = _open_cache(cache, dataset, config, assignments, runlocal)
    stage(settings, opened, data_root, run, _device(device))


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

    on = _device(device)
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


datasets = typer.Typer(help="What datasets there are, where their files go, and what is wrong with them.")
app.add_typer(datasets, name="datasets", no_args_is_help=True)
DatasetArgument = Annotated[str, typer.Argument(metavar="NAME|FILE.yaml")]


@datasets.command("list")
def datasets_list() -> None:
    """Every dataset known by name."""
    from stages.report import dataset_list

    dataset_list()


@datasets.command("show")
def datasets_show(name: DatasetArgument, data_root: DataRootOption = DATA) -> None:
    """Where its files are looked for, its classes, their mask values and prompts, its seen and unseen split.

    Example: clip-zss datasets show coco-stuff
    """
    from stages.report import dataset_layout

    dataset_layout(resolve(name).dataset, data_root)


@datasets.command("check")
def datasets_check(name: DatasetArgument, data_root: DataRootOption = DATA) -> None:
    """Read every image and mask; print a class histogram and what is missing, damaged, mis-sized or miscounted.

    Exit code 2 on any fault. Example: clip-zss datasets check my-photos.yaml --data-root ~/photos
    """
    from stages.datasets import check
    from stages.report import check_table

    config = resolve(name).dataset
    found = check(config, data_root)
    check_table(config, found)
    if found.faults:
        count = len(found.faults)
        raise UserError(
            f"{config.name} has {count} fault{'s' if count > 1 else ''}, listed above: mend the files or the YAML"
        )


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
    count: Annotated[int, typer.Option("--count", min=1, help="How many random images.")] = 8,
    output: Annotated[Path, typer.Option("--output", metavar="FILE.png", help="Where the picture goes.")] = Path(
        "pseudo-labels.png"
    ),
) -> None:
    """Show what stage one found: a picture of regions, and a table of groups, coverage and purity.

    Example: clip-zss inspect-pseudolabels --count 12 --output regions.png
    """
    from stages.inspect import choose_rows, sheet, table
    from stages.report import pseudo_label_table

    if output.suffix.lower() != ".png":
        raise UserError(f"--output {output}: the picture is a PNG, give a name that ends in .png")
    opened, settings = _open_cache(cache, dataset, None, set_)
    rows = choose_rows(opened, image, count, seed or 0)
    pseudo_label_table(table(settings, opened, data_root, rows))
    typer.echo(f"picture: {sheet(settings, opened, data_root, rows, output)}")


caches = typer.Typer(help="What a cache holds, whether every byte of it is as it was written, and how to mend it.")
app.add_typer(caches, name="cache", no_args_is_help=True)
LocationArgument = Annotated[str, typer.Argument(metavar="CACHE", help="Its folder or URL.")]


@caches.command("info")
def cache_info(location: LocationArgument) -> None:
    """What it was made from, how much of it is done, and its size.

    Example: clip-zss cache info caches/scenes-1a2b3c4d5e6f
    """
    from cache.verify import info
    from stages.report import cache_table

    cache_table(info(location))


@caches.command("verify")
def cache_verify(location: LocationArgument) -> None:
    """Read every byte again and name each file that is missing or changed, or that nothing vouches for.

    Exit code 2 on damage. Example: clip-zss cache verify caches/scenes-1a2b3c4d5e6f
    """
    from cache.verify import verify
    from stages.report import damage_list

    found = verify(location)
    damage_list(found)
    damaged = sum(damage.kind != "stray" for damage in found)
    if damaged:
        raise UserError(f"{location}: {damaged} files are damaged, listed above: run `cache repair {location}`")


@caches.command("repair")
def cache_repair(location: LocationArgument, data_root: DataRootOption = DATA, device: DeviceOption = "auto") -> None:
    """Restore small files from their copies, and recompute the shards that are damaged or missing, and only those.

    Example: clip-zss cache repair caches/scenes-1a2b3c4d5e6f --data-root ~/data
    """
    from stages.maintenance import repair
    from stages.report import damage_list

    damage_list(repair(location, data_root, _device(device)))


@caches.command("gc")
def cache_gc(location: LocationArgument) -> None:
    """Delete what kills left behind: temporary files, and files of shards that never were completed.

    Example: clip-zss cache gc caches/scenes-1a2b3c4d5e6f
    """
    from cache.verify import gc

    deleted, freed = gc(location)
    for path in deleted:
        typer.echo(f"deleted: {path}")
    typer.echo(f"{len(deleted)} files, {freed:,} bytes freed")


bench = typer.Typer(help="How fast things are, side by side in one process.")
app.add_typer(bench, name="bench", no_args_is_help=True)


@bench.command("inference")
def bench_inference(
    student: Annotated[list[str], typer.Option("--student", help="As student.model (timm:NAME, ...); repeatable.")] = [  # noqa: B006
        "segformer-b0",
        "segformer-b4",
        "segnext-b",
        "swin-b",
    ],
    classes: Annotated[str, typer.Option("--classes", help="Numbers of classes, separated by commas.")] = "20,171,847",
    size: Annotated[int, typer.Option("--size", min=32, help="Side of the image; a multiple of 16.")] = 512,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Timed rounds, after one that warms up.")] = 5,
    precision: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option("--precision", help="Of every model.")] = "fp32",
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE.md", help="Write the table here too, and as CSV.")
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Time the student alone against CLIP's own dense prediction, and against CLIP in the loop of the kind of ZegCLIP.

    Example: clip-zss bench inference --student segformer-b4 --classes 171
    """
    from stages.bench import bench_inference as stage
    from stages.bench import write_table
    from stages.report import bench_table

    try:
        counts = [int(count) for count in classes.split(",")]
    except ValueError as error:
        raise UserError(f"--classes {classes}: write numbers separated by commas") from error
    if not 1 <= min(counts) <= max(counts) <= 100_000:
        raise UserError(f"--classes {classes}: from 1 to 100000 classes")
    if size % 16:
        raise UserError(f"--size {size}: CLIP's tokens are 16 pixels wide, use {size - size % 16}")
    if output and not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}, make it first")
    on = _device(device)
    rows = stage(student, counts, size, rounds, on, precision)
    bench_table(rows)
    if output:
        asked = " ".join(f"--student {name}" for name in student)
        write_table(
            rows, output, f"clip-zss bench inference {asked} --classes {classes} --size {size} --rounds {rounds} "
            f"--precision {precision}", on,
        )  # fmt: skip


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
    stage(output, chosen, set_, _device(device))


def main() -> None:
    """Runs the app; a user's mistake is one line on stderr and exit code 2."""
    try:
        app()
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise  # not about a file that the user could mend
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
