"""Times inference: students alone, CLIP's dense prediction, and a pipeline with CLIP in the loop."""

import csv
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from configs.schema import Student as StudentConfig
from pipeline.clip_in_the_loop import ClipInTheLoop, DenseClip
from pipeline.inference import ClassLogits, Window
from pipeline.metrics import best_of
from pipeline.precision import autocast
from pipeline.student.student import Student
from stages.common.progress import say

CLIP = "ViT-B-16"
HEADER = ("what", "classes", "ms", "images/s", "x CLIP dense", "x CLIP in the loop")


@dataclass(frozen=True)
class Row:
    """Medians over the rounds. `ratios`: how many times faster than CLIP's dense prediction and CLIP in the loop."""

    what: str
    classes: int
    seconds: float
    ratios: tuple[float, float]

    def cells(self) -> list[str]:
        numbers = (f"{1000 * self.seconds:.0f}", f"{1 / self.seconds:.2f}", *(f"{ratio:.2f}" for ratio in self.ratios))
        return [self.what, str(self.classes), *numbers]


def bench_inference(
    students: Sequence[str], classes: Sequence[int], size: int, rounds: int, device: str, precision: str
) -> list[Row]:
    """Times one image of `size` x `size`, from pixels to the class of every pixel, with random weights.

    In every round each model runs once, so other load on the machine affects all of them alike. The first round is a
    warm-up and does not count. A ratio is the median of the rounds' ratios.
    """
    torch.manual_seed(0)
    width = 512  # ViT-B/16's
    alone = {name: Student(StudentConfig(model=name, weights="none"), width) for name in students}
    clip = DenseClip(CLIP, size)
    modules: dict[str, tuple[torch.nn.Module, int]] = {
        f"CLIP {CLIP}, dense": (clip, clip.stride),
        f"CLIP {CLIP} in the loop": (ClipInTheLoop(clip), clip.stride),
        **{name: (student, student.stride) for name, student in alone.items()},
    }
    rows = []
    for count in classes:
        text_features = torch.nn.functional.normalize(torch.randn(count, width), dim=1).to(device)
        pixels = torch.randn(1, 3, size, size).to(device)
        times: dict[str, list[float]] = {name: [] for name in modules}
        for turn in range(rounds + 1):
            for name, (module, stride) in modules.items():
                seconds = _time(module.to(device).eval(), pixels, text_features, stride, precision)
                if turn:
                    times[name].append(seconds)
            say(f"{count} classes: round {turn} of {rounds}" + ("" if turn else " (warm-up)"))
        dense, loop = (times[name] for name in list(modules)[:2])
        for name, own in times.items():
            ratios = [statistics.median(b / a for a, b in zip(own, base, strict=True)) for base in (dense, loop)]
            rows.append(Row(name, count, statistics.median(own), (ratios[0], ratios[1])))
    return rows


@torch.inference_mode()
def _time(model: torch.nn.Module, pixels: Tensor, text_features: Tensor, stride: int, precision: str) -> float:
    height, width = pixels.shape[-2:]
    cuda = pixels.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    with autocast(pixels.device.type, precision):
        classify = model.classify if isinstance(model, Student) else model
        logits = classify(pixels, text_features)[0].float()
    whole = ClassLogits((height, width), stride, (Window((0, height, 0, width), logits),))
    best_of(whole, list(range(len(text_features))), (height, width))
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def write_table(rows: Sequence[Row], file: Path, command: str, device: str) -> None:
    """FILE.md with the command and the machine, and the same rows in FILE.csv."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    lines = [
        "# Inference: the student alone, and with CLIP in the loop",
        "",
        f"`{command}`, on {name} ({platform.machine()}, torch {torch.__version__}).",
        "Medians of one image, from pixels to the class of every pixel, with random weights; ratios are taken round by",
        f"round, all models in one process. In the loop: {CLIP}'s image tower, three decoder layers, a query a class.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
        *("| " + " | ".join(row.cells()) + " |" for row in rows),
    ]
    file.with_suffix(".md").write_text("\n".join(lines) + "\n")
    with file.with_suffix(".csv").open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(HEADER)
        writer.writerows(row.cells() for row in rows)
