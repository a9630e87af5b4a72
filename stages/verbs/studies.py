"""The commands that run whole experiments: demo, ablate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from configs.errors import UserError
from configs.load import resolve
from configs.schema import Config
from stages.verbs.options import (
    DATA,
    ConfigOption,
    DataRootOption,
    DatasetOption,
    DeviceOption,
    SetOption,
    device_of,
    resumable,
)


def demo(
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder for tables and pictures.")] = Path(
        "demo"
    ),
    seeds: Annotated[str, typer.Option("--seeds", help="Training seeds, separated by commas.")] = "0",
    set_: SetOption = [],  # noqa: B006
    device: DeviceOption = "auto",
) -> None:
    """Run the whole pipeline on the embedded dataset, with and without local distillation, and write a results table.

    Example: clip-zss demo --seeds 0,1,2 --output benchmarks
    """
    from stages.studies.demo import demo as stage

    try:
        chosen = [int(seed) for seed in seeds.split(",")]
    except ValueError as error:
        raise UserError(f"--seeds {seeds}: write numbers separated by commas") from error
    with resumable():
        stage(output, chosen, set_, device_of(device))


def ablate(
    table: Annotated[
        str, typer.Argument(metavar="TABLE|FILE.yaml", help="A table in configs/ablations, or your own file.")
    ],
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Number of training seeds, counted from 0.")] = 3,
    dataset: DatasetOption = None,
    config: ConfigOption = None,
    data_root: DataRootOption = DATA,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder for CSV, table and plot.")] = Path(
        "ablations"
    ),
    device: DeviceOption = "auto",
) -> None:
    """Train and score every row of a table, and report which of the paper's claims hold. Continues if interrupted.

    Example: clip-zss ablate losses --seeds 3 --output benchmarks/ablations
    """
    from configs.ablation import read_ablation
    from stages.studies.ablate import ablate as stage

    name, content = read_ablation(table)
    command = f"clip-zss ablate {table} --seeds {seeds}"
    command += "".join(f" {flag} {value}" for flag, value in (("--dataset", dataset), ("--config", config)) if value)

    def settings_of(assignments: Sequence[str]) -> Config:
        return resolve(dataset, config, assignments)

    with resumable():
        files = stage(name, content, seeds, settings_of, command, data_root, output, device_of(device))
    for file in files:
        typer.echo(f"written: {file}")
