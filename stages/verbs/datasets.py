"""The commands of `clip-zss datasets`."""

from pathlib import Path
from typing import Annotated

import typer

from configs.errors import UserError, writing
from configs.load import resolve
from stages.verbs.options import DATA, DataRootOption, JsonOption, print_result

app = typer.Typer(no_args_is_help=True, help="List datasets, show where their files go, and check them.")
DatasetArgument = Annotated[str, typer.Argument(metavar="NAME|FILE.yaml")]


@app.command("list")
def datasets_list() -> None:
    """List the built-in datasets."""
    from stages.verbs.report import dataset_list

    dataset_list()


@app.command("show")
def datasets_show(name: DatasetArgument, data_root: DataRootOption = DATA) -> None:
    """Show a dataset's expected files, its classes with mask values and prompts, and its unseen splits.

    Example: clip-zss datasets show coco-stuff
    """
    from stages.verbs.report import dataset_layout

    dataset_layout(resolve(name).dataset, data_root)


@app.command("check")
def datasets_check(
    name: DatasetArgument,
    data_root: DataRootOption = DATA,
    fix_list: Annotated[
        Path | None,
        typer.Option(
            "--fix-list",
            metavar="FILE",
            help="Write the ids of good pairs, one per line, for `ids:`; {split} in FILE becomes the split's name.",
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Read every image and mask; print a class histogram and list files that are missing, damaged or inconsistent.

    The exit code is 2 if anything is wrong. Example: clip-zss datasets check my-photos.yaml --data-root ~/photos
    """
    from stages.common.datasets import check, good_lists
    from stages.verbs.report import check_report, check_table

    config = resolve(name).dataset
    lists = good_lists(config, fix_list) if fix_list else {}
    found = check(config, data_root)
    for split, ids in found.good.items() if fix_list else ():
        with writing(lists[split]):
            lists[split].write_text("".join(f"{image_id}\n" for image_id in ids), encoding="utf-8")
    print_result(lambda: check_table(config, found), check_report(config, found), json_file)
    if found.faults:
        count = len(found.faults)
        raise UserError(
            f"{config.name} has {count} fault{'s' if count > 1 else ''}, listed above: fix the files or the YAML"
        )
