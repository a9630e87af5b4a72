"""Training at COCO-Stuff's size, simulated: 118,287 cached views of random content; start-up, and memory over steps.

    python benchmarks/coco_stuff_size.py                       # ten minutes on two cores
    python benchmarks/coco_stuff_size.py --images 1000 --steps 300

The images are links to a few small pictures, the cache is written with random CLS tokens (512 float16) and pseudo
labels (32 x 32), 2 KiB a view, and `train` is run on it as a user starts it, by --cache: all its checks, all its
loading. The student is small and its views are of 32 pixels, so that thousands of steps take minutes.

Start-up: seconds from the command to the end of its first step, by the clock, and CPU of the main process. Memory:
anonymous resident MiB of the main process and of its loader workers together, after the steps named.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from cache.layout import array_specs
from cache.manifest import Manifest
from cache.writer import create_cache, write_shard
from configs.load import resolve
from configs.schema import Config
from pipeline.data.dataset import SegmentationDataset
from pipeline.data.scenes import render_scene
from stages.common.caches import split_settings

ROOT = Path(__file__).parent.parent
PICTURES, SIDE, WIDTH, GRID, GROUPS, MOST = 32, 96, 512, 32, 8, 80
SETTINGS = [
    "views.size=32", "views.count=1", "student.model=timm:tf_efficientnet_lite0", "student.weights=none",
    "student.channels=32", "loss.label_stride=4", "train.batch_size=2", "train.workers=1", "train.warmup=0",
]  # fmt: skip


def write_dataset(root: Path, images: int) -> None:
    """In COCO-Stuff's layout: `images` links to PICTURES files; four validation images."""
    for split, count in (("train2017", images), ("val2017", 4)):
        folders = [root / "coco_stuff164k" / kind / split for kind in ("images", "annotations")]
        for folder in folders:
            folder.mkdir(parents=True)
        for index in range(count):
            targets = [folder / f"{index:012d}{end}" for folder, end in zip(folders, (".jpg", ".png"), strict=True)]
            if index < PICTURES:
                image, mask = render_scene(np.random.default_rng(index), SIDE)
                Image.fromarray(image).save(targets[0], quality=90)
                mask[mask == 11] = 255  # a value that COCO-Stuff dropped
                Image.fromarray(mask).save(targets[1])
                continue
            for target in targets:
                os.link(target.with_name(f"{index % PICTURES:012d}{target.suffix}"), target)


def write_cache(path: Path, config: Config, data_root: Path) -> None:
    dataset = SegmentationDataset(config.dataset, data_root, "train")
    content, context = split_settings(config.stage_one)
    manifest = Manifest.describe(
        settings={**content, "files": {"dataset": dataset.digest()}}, versions={}, image_ids=dataset.ids, views=1,
        shard_images=config.storage.shard_images, context=context,
        arrays=array_specs(WIDTH, GRID, MOST, config.storage.shard_images, "none"),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    text = rng.standard_normal((len(config.dataset.classes), WIDTH)).astype(np.float32)
    create_cache(path, manifest, dataset.ids, text / np.linalg.norm(text, axis=1, keepdims=True))
    for index in range(manifest.shards):
        start, stop = manifest.shard_rows(index)
        labels = rng.integers(0, GROUPS, (stop - start, 1, GRID, GRID), np.uint8)
        labels[rng.random(labels.shape) < 0.5] = 255
        views = np.tile(np.array([0, 0, 1, 1, 0], np.float32), (stop - start, 1, 1))
        views[..., 4] = rng.integers(0, 2, (stop - start, 1))
        cls_tokens = rng.standard_normal((stop - start, 1, WIDTH)).astype(np.float16)
        regions = np.zeros((stop - start, 1, MOST, WIDTH), np.int8)
        regions[:, :, :GROUPS] = rng.integers(-127, 128, (stop - start, 1, GROUPS, WIDTH), np.int8)
        arrays = {
            "cls_tokens": cls_tokens, "pseudo_labels": labels, "kmeans_labels": labels, "region_tokens": regions,
            "views": views,
        }  # fmt: skip
        write_shard(path, index, 0, arrays)


def anonymous(pid: int) -> float:
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1024


def steps_done(timing: Path) -> int:
    with suppress(OSError):
        return timing.read_bytes().count(b"\n")
    return 0


def train(folder: Path, cache: Path, steps: int) -> tuple[float, float, list[tuple[int, float, float]]]:
    """Start-up by the clock and in CPU; (step, MiB of the main process, MiB of its workers) as steps go by."""
    run = folder / "run"
    settings = [f"train.iterations={steps}", f"train.validate_every={steps}", *SETTINGS]
    command = [sys.executable, str(ROOT / "cli.py"), "train", "--cache", str(cache), "--data-root", str(folder)]
    command += ["--device", "cpu", "--run", str(run), *(f"--set={setting}" for setting in settings)]
    begun, startup, memory = time.perf_counter(), (0.0, 0.0), []
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        one = psutil.Process(process.pid)
        while process.poll() is None:
            done = steps_done(run / "timing.jsonl")
            with suppress(psutil.NoSuchProcess, OSError, KeyError):
                if done and not memory:
                    startup = time.perf_counter() - begun, sum(one.cpu_times()[:2])
                if done > (memory[-1][0] if memory else 0) and done < steps:
                    children = sum(anonymous(child.pid) for child in one.children(recursive=True))
                    memory.append((done, anonymous(one.pid), children))
            time.sleep(0.02 if not memory else 0.5)
        if process.returncode:
            raise SystemExit((folder / "log").read_text())
    return *startup, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    config = resolve("coco-stuff", assignments=SETTINGS)
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name).absolute()
        write_dataset(folder, arguments.images)
        write_cache(folder / "cache", config, folder)
        print("written", file=sys.stderr, flush=True)
        clock, cpu, memory = train(folder, folder / "cache", arguments.steps)
        steps = [json.loads(line) for line in (folder / "run" / "timing.jsonl").read_text().splitlines()]
    waited = sum(step["waited"] for step in steps[1:]) / sum(step["seconds"] for step in steps[1:])
    print(f"{arguments.images:,} views: start-up {clock:.1f} s, CPU of the main process {cpu:.1f} s; ")
    print(f"after the first step {waited:.1%} of the time was spent waiting for images\n")
    print("| after step | main process, MiB | workers, MiB |\n|---|---|---|")
    for part in (0.05, 0.1, 0.25, 0.5, 0.75, 0.95):
        step, main_process, workers = min(memory, key=lambda row: abs(row[0] - part * arguments.steps))
        print(f"| {step} | {main_process:.1f} | {workers:.1f} |")


if __name__ == "__main__":
    main()
