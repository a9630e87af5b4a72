"""The commands that report on this machine: runs, doctor."""

from dataclasses import asdict

import typer

from stages.common.progress import show
from stages.verbs.options import STDOUT, DeviceOption, JsonOption, print_result


def runs(json_file: JsonOption = None) -> None:
    """List the caches in caches/ and the runs in runs/: progress, size, best validation score, differing settings.

    Example: clip-zss runs --json - | jq '.runs[].score'
    """
    from stages.upkeep.overview import caches
    from stages.upkeep.overview import runs as stage
    from stages.verbs.report import overview_table

    found_caches, found_runs = caches(), stage()
    print_result(
        lambda: overview_table(found_caches, found_runs),
        {"caches": [asdict(entry) for entry in found_caches], "runs": [asdict(entry) for entry in found_runs]},
        json_file,
    )


def doctor(device: DeviceOption = "auto", json_file: JsonOption = None) -> None:
    """Check that everything works here: versions, GPUs, disk space, and one image through every part (about 30 s).

    A GPU is also compared with the processor. Exit code 1 if a part fails. Example: clip-zss doctor --device cuda:1
    """
    from stages.upkeep.doctor import doctor as stage

    found = []
    for item in stage(device):
        found.append(item)
        if json_file != STDOUT:
            show(f"{'FAULT' if item.fault else 'ok':5} {item.part}: {item.text}")
    print_result(lambda: None, [asdict(item) for item in found], json_file)
    if any(item.fault for item in found):
        raise typer.Exit(1)
