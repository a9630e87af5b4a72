"""The commands that use results: evaluate, predict, export, inspect-pseudolabels."""

import math
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from configs.errors import UserError
from configs.load import as_settings, resolve
from stages.common.progress import say, show
from stages.verbs.options import (
    DATA,
    STDOUT,
    CacheOption,
    ConfigOption,
    DataRootOption,
    DatasetOption,
    DeviceOption,
    JsonOption,
    RunlocalOption,
    RunOption,
    SeedOption,
    SetOption,
    device_of,
    open_cache,
    print_result,
)


def evaluate(
    dataset: DatasetOption = None,
    data_root: DataRootOption = DATA,
    run: RunOption = None,
    config: ConfigOption = None,
    set_: SetOption = [],  # noqa: B006
    runlocal: RunlocalOption = False,
    device: DeviceOption = "auto",
    teacher_dense: Annotated[
        bool, typer.Option("--teacher-dense", help="Score the teacher's dense prediction instead.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Score a run: pixel accuracy, mIoU of seen and unseen classes, hIoU (their harmonic mean), IoU of every class.

    On a dataset other than the run's, the score is mIoU over all classes of that dataset; CLIP's text encoder is loaded
    for their names.

    Example: clip-zss evaluate --dataset pascal-voc --set evaluate.mode=slide --json scores.json
    """
    from stages.apply.evaluate import evaluate as stage
    from stages.apply.evaluate import features_of
    from stages.apply.predictor import student_predictor, teacher_predictor
    from stages.common.ranks import is_main, ranks
    from stages.common.runs import load_run, newest_run
    from stages.verbs.report import score_report, score_table

    with ranks(device_of(device)) as on:
        opened = None
        if teacher_dense:
            base = None if run is None and (dataset or config) else as_settings(load_run(run or newest_run()).config)
            settings = resolve(dataset, config, set_, base, runlocal)
            name, predict = "teacher's dense tokens", teacher_predictor(settings, on)
        else:
            opened = load_run(run or newest_run(), on)
            settings = resolve(dataset, config, set_, as_settings(opened.config), runlocal)
            settings, features = features_of(settings, opened, on)
            name, predict = str(opened), student_predictor(opened.student, features, settings)
        gamma, scores = stage(predict, settings, data_root, opened)
        found = (name, settings, gamma, scores, opened.alpha if opened else None)
        if is_main():
            print_result(lambda: score_table(*found), score_report(*found), json_file)


def predict(
    photos: Annotated[list[Path], typer.Argument(metavar="PHOTO...", help="Photos, or folders of photos.")],
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes",
            metavar="WORDS|FILE",
            help="Class names separated by commas, synonyms by |; or a text file, one per line. Default: as trained.",
        ),
    ] = None,
    run: RunOption = None,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder for the results.")] = Path(
        "predictions"
    ),
    gamma: Annotated[
        float | None,
        typer.Option("--gamma", help="Value subtracted from the logits of seen classes; default: the run's."),
    ] = None,
    others: Annotated[
        bool,
        typer.Option(
            "--others",
            help="Let the training classes compete too; the mask's highest value, 255 or 65535, is none of yours.",
        ),
    ] = False,
    rle: Annotated[bool, typer.Option("--rle", help="Also write COCO run lengths as JSON.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Also show CLIP's dense prediction; loads CLIP.")] = False,
    attention: Annotated[
        bool, typer.Option("--attention", help="Also show where GLM attends for CLIP's CLS token; loads CLIP.")
    ] = False,
    device: DeviceOption = "auto",
) -> None:
    """Segment your own photos with your own words: writes an overlay with a legend and an index mask for each photo.

    The training classes do not need CLIP; new words are encoded once with its text encoder. Photos can be of any size
    and any common format.

    Example: clip-zss predict holiday/ --classes "cow|bull|calf, grass, sky" --output found
    """
    from stages.apply.predict import Segmenter
    from stages.apply.predict import predict as stage
    from stages.apply.words import read_words
    from stages.common.ranks import is_main, ranks
    from stages.common.runs import newest_run

    if gamma is not None and not math.isfinite(gamma):
        raise UserError(f"--gamma {gamma}: give a finite number")
    words = None if classes is None else read_words(classes)
    with ranks(device_of(device)) as on:
        segmenter = Segmenter.load(run or newest_run(), on, gamma)
        say(f"run: {segmenter.run}")
        done, failures = stage(segmenter, photos, words, output, rle, compare, attention, others)
        if not is_main():
            return
    for line in failures:
        with suppress(OSError):  # of a stderr that is full or closed
            typer.echo(f"skipped: {line}", err=True)
    if done:
        show(f"results: {output}")
    if failures:
        rest = "; the others are done" if done else ""
        raise UserError(f"{len(failures)} photos failed, listed above: correct them{rest}")


def export(
    run: RunOption = None,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="New folder to write.")] = Path("exported"),
    precision: Annotated[
        Literal["fp32", "fp16"],
        typer.Option("--precision", help="Precision of weights and arithmetic; inputs and logits stay fp32."),
    ] = "fp32",
) -> None:
    """Export a run for deployment: checked ONNX and torch.export programs, weights, class features and a model card.

    Class features are an input, so the classes can be changed later. Needs the extra `export` of clip-zss.

    Example: clip-zss export --run runs/scenes-001 --output my-model
    """
    from stages.apply.export import export as stage
    from stages.common.runs import load_run, newest_run

    for name, difference in stage(load_run(run or newest_run()), output, precision).items():
        show(f"{output / name}: within {difference:.1e} of the student's largest logit")


def inspect_pseudolabels(
    dataset: DatasetOption = None,
    data_root: DataRootOption = DATA,
    cache: CacheOption = None,
    set_: SetOption = [],  # noqa: B006
    seed: SeedOption = None,
    image: Annotated[
        list[str], typer.Option("--image", metavar="ID", help="Image to show; repeatable. Default: random images.")
    ] = [],  # noqa: B006
    count: Annotated[
        int | None,
        typer.Option("--count", min=1, max=10**7, help="Random images; default: 200, or 8 with --terminal or --png."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder for the gallery.")] = Path(
        "pseudo-labels"
    ),
    terminal: Annotated[bool, typer.Option("--terminal", help="Print a table instead.")] = False,
    json_file: JsonOption = None,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FILE.png", help="Write a picture of a few images instead.")
    ] = None,
) -> None:
    """Write a gallery of the pseudo labels for the browser: regions, fused groups and masks. It works offline.

    If the cache has dense tokens (--set storage.dense_tokens=float16), the gallery can change lambda and name groups.

    Example: clip-zss inspect-pseudolabels --count 500 --output gallery
    """
    from stages.inspect.regions import choose_rows, sheet, table
    from stages.verbs.report import pseudo_label_table

    if png and png.suffix.lower() != ".png":
        raise UserError(f"--png {png}: give a name that ends in .png")
    opened, settings = open_cache(cache, dataset, None, set_)
    rows = choose_rows(opened, image, count or (8 if terminal or png else 200), seed or 0)
    if terminal or json_file:
        found = table(settings, opened, data_root, rows)
        print_result(lambda: pseudo_label_table(found), [asdict(row) for row in found], json_file)
    if png:
        (say if json_file == STDOUT else show)(f"picture: {sheet(settings, opened, data_root, rows, png)}")
    if not terminal and not png and not json_file:
        from stages.inspect.gallery import make_gallery

        show(f"gallery: {make_gallery(settings, opened, data_root, rows, output)}")
