"""A training step with the cache and with the teacher live; and how fast images can be made ready.

    python benchmarks/stage_two.py step                                   # a quarter of an hour on two cores
    python benchmarks/stage_two.py loader --dataset photos.yaml --data-root DIR

Both take rendered scenes of 640 x 640 as JPEG, or the training split of --dataset. All that is timed runs in turns
within one process, on one thread, and ratios are taken round by round, of CPU seconds where that is said: other work on
the machine slows the clock but hardly those.

step: SegFormer-B0 and ViT-B/16 (random weights) at 512 x 512, batch 4. The cache is made first, by `precompute`. Steps
of both kinds alternate; then steps with the cache alone show what the loader, one worker, lets them wait.
loader: samples of TrainingViews beside a bare loop that decodes the image with PIL and resizes it to 512 x 512; then
the loader itself with a worker, for a student that takes no time, beside the same loop.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from cache.reader import Cache, open_cache
from configs.load import resolve
from configs.schema import Config, Views
from pipeline.data.dataset import SegmentationDataset
from pipeline.data.scenes import CLASSES, render_scene
from pipeline.data.training import TrainingViews
from pipeline.data.views import draw_views
from pipeline.learning.criterion import Criterion
from pipeline.student.student import Student
from stages.common.devices import keep_freed_memory
from stages.train.batches import Batch, Batches
from stages.train.precision import gradient_scaler, student_forward

ROOT = Path(__file__).parent.parent
IMAGES, SIDE, SIZE, BATCH = 16, 640, 512, 4
MEAN = (0.485, 0.456, 0.406)


def write_scenes(folder: Path) -> Path:
    root = folder / "rendered"
    root.mkdir()
    for index in range(IMAGES):
        image, mask = render_scene(np.random.default_rng(index), SIDE)
        Image.fromarray(image).save(root / f"{index:02d}.jpg", quality=90)
        Image.fromarray(mask).save(root / f"{index:02d}.png")
    files = {"images": "{id}.jpg", "masks": "{id}.png"}
    unseen = ["heart", "ring", "arrow", "dots", "bricks", "clouds"]
    dataset = {"name": "rendered", "splits": {"train": files}, "classes": list(CLASSES), "unseen": unseen}
    (folder / "rendered.yaml").write_text(yaml.safe_dump(dataset))
    return folder / "rendered.yaml"


def median_ratio(above: list[float], below: list[float]) -> str:
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    return f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"


# --- step ---


def make_cache(dataset: Path, data_root: Path, folder: Path) -> tuple[Config, Cache]:
    settings = [
        "teacher.pretrained=none", "views.count=2", "precompute.batch_size=4", "storage.shard_images=8",
        "student.model=segformer-b0", "student.weights=none", f"train.batch_size={BATCH}", "train.workers=1",
    ]  # fmt: skip
    asked = ["--dataset", str(dataset), "--data-root", str(data_root), *(f"--set={setting}" for setting in settings)]
    command = [sys.executable, str(ROOT / "cli.py"), "precompute", "--cache", str(folder / "cache"), "--device", "cpu"]
    subprocess.run([*command, *asked], check=True, cwd=folder)
    return resolve(str(dataset), assignments=settings), open_cache(folder / "cache")


class Steps:
    """What `train` does in a step; `iterations` of it with the teacher cached or live."""

    def __init__(self, config: Config, cache: Cache, data_root: Path, teacher: str, iterations: int) -> None:
        schedule = config.train.model_copy(update={"teacher": teacher, "iterations": iterations})
        config = config.model_copy(update={"train": schedule})
        dataset = SegmentationDataset(config.dataset, data_root, "train")
        torch.manual_seed(0)
        text_features = torch.from_numpy(cache.text_features)
        student = Student(config.student, text_features.shape[1]).train()
        self.criterion = Criterion(config.loss, text_features[dataset.config.seen_channels])
        parameters = [*student.parameters(), *self.criterion.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, schedule.lr)
        self.forward, self.scaler = student_forward(student, schedule), gradient_scaler(schedule, "cpu")
        self.batches = Batches(config, cache, dataset, student.mean, student.std, "cpu")
        self._ready: Iterator[list[Batch]] = iter(self.batches)
        self._teach = self.batches.teacher
        self.batches.teacher = self._timed
        self.teacher_seconds = 0.0

    def _timed(self, loaded: dict[str, torch.Tensor]) -> Any:
        start = time.thread_time()
        outputs = self._teach(loaded)
        self.teacher_seconds = time.thread_time() - start
        return outputs

    def __call__(self) -> tuple[float, float, float]:
        """CPU seconds of a step and of its teacher; seconds by the clock. The clock leaves no wait out."""
        clock, start = time.perf_counter(), time.thread_time()
        (batch,) = next(self._ready)
        features, auxiliary = self.forward(batch.pixels)
        given = (batch.cls_tokens, batch.seen, batch.groups, batch.rows, auxiliary)
        losses = self.criterion(features, *given, region_tokens=batch.region_tokens)
        total = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return time.thread_time() - start, self.teacher_seconds, time.perf_counter() - clock


def bench_step(dataset: Path, data_root: Path, folder: Path, rounds: int) -> None:
    config, cache = make_cache(dataset, data_root, folder)
    cached = Steps(config, cache, data_root, "cached", 3 * rounds + 1)
    online = Steps(config, cache, data_root, "online", rounds + 1)
    found: dict[str, list[Any]] = {"cached": [], "online": []}
    for number in range(rounds + 1):
        for name, step in (("online", online), ("cached", cached)):
            times = step()
            if number:  # the first allocates
                found[name].append(times)
                print(f"round {number}, {name}: {times}", file=sys.stderr, flush=True)
    alone = []
    for _ in range(2 * rounds):
        seconds = cached()[2]
        alone.append((seconds, cached.batches.waited))
    cpu = {name: [times[0] for times in steps] for name, steps in found.items()}
    shares = [times[1] / times[0] for times in found["online"]]
    limits = [1 / (1 - share) for share in shares]
    ratios = [a / b for a, b in zip(cpu["online"], cpu["cached"], strict=True)]
    clock = [[times[2] for times in found[name]] for name in ("online", "cached")]
    print("| | |\n|---|---|")
    for name, seconds in cpu.items():
        print(f"| CPU seconds of a step, {name} | {statistics.median(seconds):.2f} |")
    print(f"| teacher's share of the step online | {statistics.median(shares):.3f} |")
    print(f"| limit, 1 / (1 - share) | {statistics.median(limits):.2f} |")
    print(f"| step online / cached, CPU | {median_ratio(cpu['online'], cpu['cached'])} |")
    print(f"| of the limit | {median_ratio(ratios, limits)} |")
    print(f"| step online / cached, clock | {median_ratio(*clock)} |")
    waited = sum(wait for _, wait in alone) / sum(seconds for seconds, _ in alone)
    print(f"| wait for the loader, {len(alone)} steps with the cache alone | {waited:.2%} |")


# --- loader ---


class FreeStudent:
    """The loader's own pace: samples as `train` has them, with one worker, and nothing done with them."""

    def __init__(self, samples: TrainingViews, batches: int) -> None:
        loader = torch.utils.data.DataLoader(
            samples, BATCH, sampler=range(batches * BATCH), num_workers=1, multiprocessing_context="spawn"
        )
        self._batches = iter(loader)

    def __call__(self) -> None:
        next(self._batches)


def bench_loader(dataset: Path, data_root: Path, rounds: int) -> None:
    torch.set_num_threads(1)
    split = SegmentationDataset(resolve(str(dataset)).dataset, data_root, "train")
    rows = [row for row in range(len(split)) if split.mask_path(row).exists()]
    views = np.zeros((len(split), 2, 5), np.float32)
    for row in rows:
        views[row] = draw_views(Views(count=2, size=SIZE), split.ids[row], split.training_pair(row)[1])
    samples = TrainingViews(split, np.array(rows), views, SIZE, 10**6, 0, MEAN)

    def bare(draw: int) -> None:
        with Image.open(split.image_path(rows[draw % len(rows)])) as image:
            np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))

    cpu: dict[str, list[float]] = {"sample": [], "bare": []}
    each, draw = 20, 0
    for number in range(rounds + 1):
        for name, make in (("sample", samples.__getitem__), ("bare", bare)):
            start = time.thread_time()
            for offset in range(each):
                make(draw + offset)
            if number:
                cpu[name].append((time.thread_time() - start) / each)
        draw += each
    free, clock = FreeStudent(samples, 5 + 5 * rounds), {"loader": [], "bare": []}
    for _ in range(5):
        free()  # what the worker made while it was waited for
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(5):
            free()
        clock["loader"].append((time.perf_counter() - start) / 5 / BATCH)
    for number in range(rounds):
        start = time.perf_counter()
        for offset in range(5 * BATCH):
            bare(number * 5 * BATCH + offset)
        clock["bare"].append((time.perf_counter() - start) / 5 / BATCH)
    print("| images/s | TrainingViews | bare decode + resize | ratio |\n|---|---|---|---|")
    for what, (own, other) in (("of CPU time", cpu.values()), ("one worker, clock", clock.values())):
        print(
            f"| {what} | {1 / statistics.median(own):.1f} | {1 / statistics.median(other):.1f} | "
            f"{median_ratio(other, own)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "loader"])
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name).absolute()
        dataset, data_root = (arguments.dataset, arguments.data_root) if arguments.dataset else (None, folder)
        dataset = dataset.absolute() if dataset else write_scenes(folder)
        if arguments.what == "step":
            bench_step(dataset, data_root.absolute(), folder, arguments.rounds)
        else:
            bench_loader(dataset, data_root, arguments.rounds)


if __name__ == "__main__":
    main()
