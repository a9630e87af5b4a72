"""What one GPU does: whether it computes what the CPU does, then the speed of every part beside its bare model.

    python -m benchmarks.gpu                        # meant to take less than eight minutes; writes benchmarks/gpu.md
    python -m benchmarks.gpu --device cpu --tiny    # a rehearsal of a minute, which writes nothing

Everything is drawn or rendered and all weights are random, so no data and no network are needed. Of each part:

agreement   stages/upkeep/agreement.py on the device and on the CPU.
stage one   `precompute` beside the teacher's forward pass alone, as benchmarks/stage_one.py measures it.
steps       a training step with the cache, of the paper's losses on 156 seen classes, beside the student's own forward
            and backward pass and the optimiser's step. The losses' share is what is left; waiting is for images.
teacher     a step with the live teacher beside one with the cache, and the limit, 1 / (1 - the teacher's share).
inference   `bench inference`: students beside CLIP's dense prediction and CLIP in the loop.

Times are medians after a warm-up.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import chdir, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from benchmarks import stage_one
from cache.reader import Cache, open_cache
from configs.load import resolve
from configs.schema import Config
from pipeline.data.dataset import SegmentationDataset
from pipeline.data.scenes import CLASSES, render_scene
from pipeline.learning.criterion import Criterion
from pipeline.student.student import Student
from stages.apply.bench import HEADER, bench_inference
from stages.common.devices import choose_device, device_name, keep_freed_memory, synchronize
from stages.common.progress import say
from stages.precompute.stage import precompute
from stages.train.batches import Batch, Batches
from stages.train.learner import Learner, make_learner
from stages.train.precision import fixed_shapes
from stages.upkeep.agreement import agreement

PAGE = Path(__file__).parent / "gpu.md"
UNSEEN = ("heart", "ring", "arrow", "dots", "bricks", "clouds")


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    images: int
    side: int  # pixels of the rendered scenes
    classes: int  # of which a fifteenth, and UNSEEN, are unseen
    students: tuple[str, ...]
    batch: int
    steps: int
    rounds: int
    inference_classes: tuple[int, ...]
    inference_size: int
    settings: tuple[str, ...]

    def config(self, dataset: Path, *more: str) -> Config:
        return resolve(str(dataset), assignments=[*self.settings, f"train.batch_size={self.batch}", *more])


PAPER = ("loss.local=false", "student.weights=none", "train.warmup=1", "storage.dense_tokens=none")
FULL = Scale(
    images=128, side=640, classes=171, students=("segformer-b0", "segformer-b4", "segnext-b", "swin-b"), batch=16,
    steps=12, rounds=3, inference_classes=(20, 171, 847), inference_size=512,
    settings=(
        *PAPER, "teacher.pretrained=none", "teacher.precision=bf16", "views.count=16", "storage.shard_images=32",
        "precompute.batch_size=32", "train.precision=bf16", "train.workers=8",
    ),
)  # fmt: skip
TINY = Scale(
    images=4, side=96, classes=30, students=("segformer-b0",), batch=2, steps=2, rounds=1, inference_classes=(2,),
    inference_size=32,
    settings=(
        *PAPER, "teacher.model=teachers/scenes-vit.json", "teacher.pretrained=teachers/scenes-vit.safetensors",
        "views.size=128", "views.count=2", "pseudo_labels.windows=[3,1]", "storage.shard_images=2", "train.workers=0",
    ),
)  # fmt: skip


def write_scenes(folder: Path, scale: Scale) -> Path:
    """Scenes of 20 classes, in a dataset of more: what the losses cost depends on the number of classes."""
    root = folder / "rendered"
    root.mkdir()
    for index in range(scale.images):
        image, mask = render_scene(np.random.default_rng(index), scale.side)
        Image.fromarray(image).save(root / f"{index:03d}.jpg", quality=90)
        Image.fromarray(mask).save(root / f"{index:03d}.png")
    others = [f"class {index}" for index in range(len(CLASSES), scale.classes)]
    unseen = [*UNSEEN, *others[: max(0, round(scale.classes * 15 / 171) - len(UNSEEN))]]
    dataset = {
        "name": "rendered", "splits": {"train": {"images": "{id}.jpg", "masks": "{id}.png"}},
        "classes": [*CLASSES, *others], "unseen": unseen,
    }  # fmt: skip
    (folder / "rendered.yaml").write_text(yaml.safe_dump(dataset))
    return folder / "rendered.yaml"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def of_agreement(device: str) -> tuple[list[str], bool]:
    found = list(agreement(device))
    rows = [[one.part, str(one), "yes" if one.holds else "NO"] for one in found]
    return table(("what, beside the CPU", "difference", "as it must be"), rows), all(one.holds for one in found)


def of_stage_one(scale: Scale, dataset: Path, folder: Path, device: str) -> list[str]:
    config = scale.config(dataset)
    rounds = stage_one.measure(config, folder, device, scale.images // config.storage.shard_images, scale.rounds)
    bare, whole = (statistics.median(one[place] for one in rounds) for place in (0, 1))
    ratio = statistics.median(one[1] / one[0] for one in rounds)
    row = [f"{config.teacher.model}, {config.views.size}", f"{bare:.1f}", f"{whole:.1f}", f"{ratio:.2f}"]
    head = ("teacher, image", "bare, views/s", "stage one, views/s", "ratio", "time of the parts, summed over threads")
    return table(head, [[*row, str(rounds[-1][2])]])


class Steps:
    """Training steps, timed one by one."""

    def __init__(self, config: Config, cache: Cache, data_root: Path, device: str) -> None:
        dataset = SegmentationDataset(config.dataset, data_root, "train")
        torch.manual_seed(0)
        text_features = torch.from_numpy(cache.text_features).to(device)
        student = Student(config.student, text_features.shape[1]).to(device).train()
        criterion = Criterion(config.loss, text_features[dataset.config.seen_channels]).to(device)
        self.learner: Learner = make_learner(config, student, criterion, device)
        self.ids, self.device = dataset.ids, device
        self.batches = Batches(config, cache, dataset, student.mean, student.std, device)
        self._teach, self.teacher_seconds = self.batches.teacher, 0.0
        self.batches.teacher = self._timed_teacher

    def _timed_teacher(self, loaded: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        start = self._now()
        outputs = self._teach(loaded)
        self.teacher_seconds = self._now() - start
        return outputs

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def __iter__(self) -> Iterator[tuple[float, float, float]]:
        """Seconds of each step, of its wait for images and of its teacher; the first two steps are left out."""
        for number, parts in enumerate(self.batches):
            with fixed_shapes():
                self.learner.step(parts, self.ids)
            seconds = self._now() - self.batches.asked
            if number >= 2:
                yield seconds, self.batches.waited, self.teacher_seconds
        self.last: Batch = parts[0]

    def bare(self, count: int) -> float:
        """Median seconds of the student's forward and backward pass and the optimiser's step, without losses."""
        found = []
        for number in range(count + 2):
            start = self._now()
            self.learner.optimizer.zero_grad(set_to_none=True)
            with fixed_shapes():
                features, auxiliary = self.learner.forward(self.last.pixels)
                outputs = [features] if auxiliary is None else [features, auxiliary]
                torch.autograd.backward(outputs, [torch.full_like(output, 1e-6) for output in outputs])
            self.learner.optimizer.step()
            if number >= 2:
                found.append(self._now() - start)
        return statistics.median(found)


def run_steps(scale: Scale, config: Config, cache: Cache, data_root: Path, device: str) -> tuple[list[float], float]:
    """Medians of seconds a step, of waiting and of the teacher; and the bare student's."""
    steps = Steps(config, cache, data_root, device)
    with closing(steps.batches):
        medians = [statistics.median(values) for values in zip(*steps, strict=True)]
    return medians, steps.bare(scale.steps)


def of_steps(scale: Scale, dataset: Path, cache: Cache, data_root: Path, device: str) -> list[str]:
    rows = []
    for name in scale.students:
        say(f"steps of {name}")
        cuda = device.startswith("cuda")
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        config = scale.config(dataset, f"student.model={name}", f"train.iterations={scale.steps + 2}")
        (step, waited, _), bare = run_steps(scale, config, cache, data_root, device)
        rows.append(
            [
                name, f"{1000 * step:.1f}", f"{1000 * bare:.1f}", f"{step / bare:.2f}",
                f"{(step - waited - bare) / step:.0%}", f"{waited / step:.1%}",
                f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if cuda else "-",
            ]
        )  # fmt: skip
    head = ("student", "step, ms", "bare step, ms", "ratio", "losses and the rest", "waiting", "peak memory, GiB")
    return table(head, rows)


def of_teacher(scale: Scale, dataset: Path, cache: Cache, data_root: Path, device: str) -> list[str]:
    more = [f"student.model={scale.students[0]}", f"train.iterations={scale.steps + 2}"]
    (cached, _, _), _ = run_steps(scale, scale.config(dataset, *more), cache, data_root, device)
    online = scale.config(dataset, *more, "train.teacher=online")
    (live, _, teacher), _ = run_steps(scale, online, cache, data_root, device)
    row = [scale.students[0], f"{1000 * cached:.1f}", f"{1000 * live:.1f}", f"{live / cached:.2f}"]
    head = ("student", "step with the cache, ms", "with the live teacher, ms", "ratio", "limit, 1 / (1 - share)")
    return table(head, [[*row, f"{live / max(live - teacher, 1e-9):.2f}"]])


def of_inference(scale: Scale, device: str) -> list[str]:
    precision = "bf16" if device.startswith("cuda") else "fp32"
    size, classes = scale.inference_size, scale.inference_classes
    rows = bench_inference(scale.students, classes, size, 3 * scale.rounds, device, precision)
    return table(HEADER, [row.cells() for row in rows])


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if the device does not agree with the CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="small models and images; prints only")
    asked = parser.parse_args(arguments)
    device, scale = choose_device(asked.device), TINY if asked.tiny else FULL
    keep_freed_memory()
    started = time.perf_counter()
    lines, agrees = of_agreement(device)
    with tempfile.TemporaryDirectory(dir=".") as name, chdir(name):  # text features are kept in the current folder
        folder = Path.cwd()
        dataset = write_scenes(folder, scale)
        lines += ["## Stage one", "", *of_stage_one(scale, dataset, folder, device)]
        cache = open_cache(precompute(scale.config(dataset), folder, str(folder / "cache"), device))
        lines += ["## Training steps", "", *of_steps(scale, dataset, cache, folder, device)]
        lines += ["## The teacher online or cached", "", *of_teacher(scale, dataset, cache, folder, device)]
    lines += ["## Inference", "", *of_inference(scale, device)]
    command = "python -m benchmarks.gpu" + (f" --device {asked.device}" if asked.device != "auto" else "")
    minutes = (time.perf_counter() - started) / 60
    head = [
        "# What one GPU does", "",
        f"`{command}{' --tiny' if asked.tiny else ''}`, {minutes:.1f} minutes, on {device_name(device)}, torch "
        f"{torch.__version__}; its docstring says what is compared.", "", "## Agreement", "",
    ]  # fmt: skip
    text = "\n".join([*head, *lines])
    print(text)
    if not asked.tiny:
        PAGE.write_text(text)
    return 0 if agrees else 1


if __name__ == "__main__":
    raise SystemExit(main())
