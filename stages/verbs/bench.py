"""The commands of `clip-zss bench`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from configs.errors import UserError
from stages.verbs.options import DeviceOption, device_of

app = typer.Typer(no_args_is_help=True, help="Measure speed.")


@app.command("inference")
def bench_inference(
    student: Annotated[list[str], typer.Option("--student", help="A student.model, such as timm:NAME; repeatable.")] = [  # noqa: B006
        "segformer-b0",
        "segformer-b4",
        "segnext-b",
        "swin-b",
    ],
    classes: Annotated[str, typer.Option("--classes", help="Numbers of classes, separated by commas.")] = "20,171,847",
    size: Annotated[int, typer.Option("--size", min=32, help="Image size in pixels; a multiple of 16.")] = 512,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Timed rounds, after one warm-up round.")] = 5,
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"], typer.Option("--precision", help="Precision of every model.")
    ] = "fp32",
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE.md", help="Also write the table to this file, and as CSV.")
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Compare the speed of students with CLIP's dense prediction and with CLIP in the loop, as in ZegCLIP.

    Example: clip-zss bench inference --student segformer-b4 --classes 171
    """
    from stages.apply.bench import bench_inference as stage
    from stages.apply.bench import write_table
    from stages.verbs.report import bench_table

    try:
        counts = [int(count) for count in classes.split(",")]
    except ValueError as error:
        raise UserError(f"--classes {classes}: write numbers separated by commas") from error
    if not 1 <= min(counts) <= max(counts) <= 100_000:
        raise UserError(f"--classes {classes}: must be from 1 to 100000 classes")
    if size % 16:
        raise UserError(f"--size {size}: CLIP's tokens are 16 pixels wide, use {size - size % 16}")
    if output and not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}, make it first")
    on = device_of(device)
    rows = stage(student, counts, size, rounds, on, precision)
    bench_table(rows)
    if output:
        asked = " ".join(f"--student {name}" for name in student)
        write_table(
            rows, output, f"clip-zss bench inference {asked} --classes {classes} --size {size} --rounds {rounds} "
            f"--precision {precision}", on,
        )  # fmt: skip
