"""Time per view and memory of stage one over 1,000, 10,000 and 100,000 views, with a tiny teacher.

    python benchmarks/scaling.py                             # ten minutes on two cores
    python benchmarks/scaling.py --views 1000 10000 --rounds 5

Every run is `precompute` as a user starts it, on a dataset of that many ids (links to a few rendered scenes, 64 x 64),
four views an image, 100 views a shard, with a random teacher of width 16 on views of 32 x 32: next to nothing is
computed, so that what grows with the dataset would show. Sizes alternate within a round.

Clock: timing.json's seconds over its views: the shards, without start-up. CPU: seconds of the command and all its
processes over the same time; it minds other work on the machine less than the clock does, but does (caches).
Both also as the cost of one more view, from each size to the next, without what the first shards cost once (lazy
imports, allocators, an idle worker at the end).
Memory: peak anonymous resident bytes, without the libraries' files, of the command's own process and of its largest
worker, over the same time. Prints Markdown tables; scaling.md was printed so.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
import yaml
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file

from cache.layout import MANIFEST
from cache.store import open_store
from pipeline.data.scenes import CLASSES, render_scene
from stages.precompute.plan import TIMING, timed_runs

ROOT = Path(__file__).parent.parent
PICTURES, SIDE, VIEWS, SHARD_IMAGES = 32, 64, 4, 25
VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


class Run(NamedTuple):
    """Milliseconds a view, by the clock and of CPU; peak MiB."""

    clock: float
    cpu: float
    main: float
    worker: float


def write_teacher(folder: Path) -> None:
    model = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
    (folder / "tiny.json").write_text(json.dumps(model))
    torch.manual_seed(0)
    state = {name: tensor.contiguous() for name, tensor in CLIP(**model).state_dict().items()}
    save_file(state, folder / "tiny.safetensors")


def write_pictures(folder: Path) -> None:
    for index in range(PICTURES):
        image, mask = render_scene(np.random.default_rng(index), SIDE)
        Image.fromarray(image).save(folder / f"image-{index}.png")
        Image.fromarray(mask).save(folder / f"mask-{index}.png")


def write_dataset(folder: Path, images: int) -> Path:
    """An experiment on a dataset of `images` ids, each a link to one of the pictures."""
    root = folder / f"links-{images}"
    for kind in ("image", "mask"):
        (root / kind).mkdir(parents=True)
        for index in range(images):
            os.link(folder / f"{kind}-{index % PICTURES}.png", root / kind / f"{index:06d}.png")
    dataset = {
        "name": root.name,
        "splits": {"train": {"images": "image/{id}.png", "masks": "mask/{id}.png", "count": images}},
        "classes": list(CLASSES),
        "unseen": ["heart", "ring", "arrow", "dots", "bricks", "clouds"],
    }
    experiment = {
        "dataset": f"{root}.dataset.yaml",
        "teacher": {"model": str(folder / "tiny.json"), "pretrained": str(folder / "tiny.safetensors")},
        "views": {"size": 32, "count": VIEWS},
        "pseudo_labels": {"windows": [2, 1]},
        "storage": {"shard_images": SHARD_IMAGES},
        "precompute": {"batch_size": 50},
    }
    Path(f"{root}.dataset.yaml").write_text(yaml.safe_dump(dataset))
    Path(f"{root}.yaml").write_text(yaml.safe_dump(experiment))
    return Path(f"{root}.yaml")


def watch(process: psutil.Process, cache: Path) -> tuple[float, float, float]:
    """Over the shards: CPU seconds of all processes, peak MiB of the process and of its largest child."""
    cpu: dict[int, float] = {}
    peaks: dict[int, float] = {}
    start = None
    while process.status() != psutil.STATUS_ZOMBIE:
        begun, ended = (cache / MANIFEST).exists(), (cache / TIMING).exists()
        if not ended:
            for one in [process, *process.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess, OSError, KeyError):
                    cpu[one.pid] = sum(one.cpu_times()[:2])
                    peaks[one.pid] = max(anonymous(one.pid), peaks.get(one.pid, 0)) if begun else 0
        if begun and start is None:
            start = sum(cpu.values())
        time.sleep(0.05)
    return sum(cpu.values()) - (start or 0), peaks.pop(process.pid), max(peaks.values())


def anonymous(pid: int) -> float:
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1024


def run(folder: Path, config: Path, name: str) -> Run:
    cache = folder / "caches" / name
    command = [sys.executable, str(ROOT / "cli.py"), "precompute", "--config", str(config), "--device", "cpu"]
    with (folder / "log").open("w") as log:
        started = subprocess.Popen(
            [*command, "--data-root", str(folder), "--cache", str(cache)], cwd=folder, stdout=log, stderr=log
        )
        cpu, main, worker = watch(psutil.Process(started.pid), cache)
        if started.wait():
            raise SystemExit((folder / "log").read_text())
    timed = timed_runs(open_store(cache))[-1]
    return Run(1000 * timed.seconds / timed.views, 1000 * cpu / timed.views, main, worker)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    found: dict[int, list[Run]] = {views: [] for views in arguments.views}
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name).absolute()
        write_teacher(folder)
        write_pictures(folder)
        configs = {views: write_dataset(folder, views // VIEWS) for views in arguments.views}
        for number in range(arguments.rounds):
            for views, config in configs.items():
                found[views].append(run(folder, config, f"{views}-{number}"))
                print(f"round {number}: {views} views, {found[views][-1]}", file=sys.stderr, flush=True)
    medians = {views: Run(*map(statistics.median, zip(*runs, strict=True))) for views, runs in found.items()}
    table(medians)


def table(medians: dict[int, Run]) -> None:
    first = next(iter(medians.values()))
    print("| views | ms/view, clock | of the first | ms/view, CPU | of the first | main, MiB | | worker, MiB | |")
    print("|" + "---|" * 9)
    for views, median in medians.items():
        cells = (f"{value:.3f} | {value / start:.3f}" for value, start in zip(median, first, strict=True))
        print(f"| {views:,} | {' | '.join(cells)} |")
    print("\n| one more view, from | to | ms, clock | ms, CPU |\n|---|---|---|---|")
    for (less, few), (more, many) in pairwise(medians.items()):
        clock, cpu = ((many[column] * more - few[column] * less) / (more - less) for column in (0, 1))
        print(f"| {less:,} | {more:,} | {clock:.3f} | {cpu:.3f} |")


if __name__ == "__main__":
    main()
