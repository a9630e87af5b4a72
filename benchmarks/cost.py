"""What a dataset costs: GPU-hours of both stages and bytes of the cache, computed, not measured.

    python benchmarks/cost.py                    # writes docs/cost.md and the costs in configs/experiments/
    python benchmarks/cost.py --images 20000 --views 4 --teacher ViT-L-14 --size 448 --student segformer-b2

On the target machine, `precompute --dry-run` measures the teacher's speed and the free disk space instead.

Speeds: an RTX 4090 runs ViT-B/16 at 512 on 433 images per second in half precision (timm's benchmark tables). An H100
SXM has 3.35 TB/s of memory bandwidth against the 4090's 1.01, and is assumed to be faster by the same factor. A
training step costs three forward passes, in half precision too, which `train.precision=auto` chooses. The student does
fewer multiplications per second than the teacher: 0.29 as many, measured on a CPU for SegFormer-B0 and ViT-B/16
(benchmarks/stage_two.md: 6.92 CPU seconds and 0.596 x 16.94, for 4 images).

The losses take the time that the H100's memory needs for their bytes (benchmarks/step_count.md), which grow with the
number of features. So does K-means on the GPU: each of 10 iterations, and a last search, moves the tokens four times,
in float64. CPU cores decode the images meanwhile, at 14 ms of one core for each in either stage
(benchmarks/stage_two.md): the page says how many cores keep up.
"""

import argparse
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import open_clip
import torch
from torch.utils.flop_counter import FlopCounterMode

from configs.load import resolve
from configs.schema import CONFIGS
from configs.schema import Student as StudentConfig
from pipeline.student.student import Student
from stages.precompute.plan import GROUPS, duration, size

PAGE = Path(__file__).parents[1] / "docs" / "cost.md"
RTX_4090_PASSES = 433.0  # a second, ViT-B/16 at 512
H100_BYTES = 3.35e12  # a second
H100_OVER_4090 = H100_BYTES / 1.01e12
LOSS_BYTES = 18.9e9  # of R at stride 4, for 16 images of 512 x 512
KMEANS_MOVES, KMEANS_ITERATIONS = 4, 11
CORE_SECONDS = 0.014  # an image
STUDENT_OVER_TEACHER = 0.29  # multiplications a second
COCO_STUFF = 118_287
ITERATIONS, BATCH = 80_000, 16  # the paper's for COCO-Stuff


@dataclass(frozen=True)
class Job:
    """A dataset, a teacher with square input of side `size`, and a student of the same input size."""

    images: int
    views: int
    teacher: str
    size: int
    student: str
    iterations: int = ITERATIONS
    batch: int = BATCH


@dataclass(frozen=True)
class Cost:
    """Seconds on one H100, and CPU cores that keep up with it; bytes before compression."""

    passes: int
    seconds_one: float
    cores_one: float
    seconds_two: float
    cores_two: float
    bytes_labels: int
    bytes_dense: int


def gmac(model: torch.nn.Module, size: int) -> float:
    """Billions of multiplications for one image, counted on meta tensors."""
    with FlopCounterMode(display=False) as counter:
        model.to("meta").eval()(torch.zeros(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 2e9


@cache
def teacher(name: str, size: int) -> tuple[float, int, int]:
    """GMAC per image, C and G of an open_clip model."""
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        tower = open_clip.create_model(name, pretrained=None, device="meta", force_image_size=size).visual
    return gmac(tower, size), config["embed_dim"], size // config["vision_cfg"]["patch_size"]


def cost(job: Job) -> Cost:
    passes = job.images * job.views
    per_second = 2 * teacher("ViT-B-16", 512)[0] * RTX_4090_PASSES * H100_OVER_4090  # GFLOP
    work, width, grid = teacher(job.teacher, job.size)
    clustering = KMEANS_ITERATIONS * KMEANS_MOVES * 8 * grid**2 * width / H100_BYTES
    view = 2 * work / per_second + clustering
    student = Student(StudentConfig(model=job.student, weights="none"), width)
    losses = LOSS_BYTES / 16 * (job.size / 512 * 4 / student.stride) ** 2 / H100_BYTES
    image = 3 * 2 * gmac(student, job.size) / (STUDENT_OVER_TEACHER * per_second) + losses
    return Cost(
        passes=passes,
        seconds_one=passes * view,
        cores_one=CORE_SECONDS / view,
        seconds_two=job.iterations * job.batch * image,
        cores_two=CORE_SECONDS / image,
        bytes_labels=passes * (2 * width + 2 * grid**2 + GROUPS * width + 20),
        bytes_dense=passes * 2 * width * grid**2,
    )


def line(job: Job) -> str:
    found = cost(job)
    cells = (
        f"{job.images:,} x {job.views}", f"{job.teacher}, {job.size}", f"{found.passes:,}", duration(found.seconds_one),
        duration(found.seconds_one / 8), f"{found.cores_one:.0f}", job.student, duration(found.seconds_two),
        duration(found.seconds_two / 8), f"{found.cores_two:.0f}", size(found.bytes_labels), size(found.bytes_dense),
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


HEADER = (
    "| images x views | teacher, size | passes | stage one, 1 H100 | 8 H100 | cores a GPU | student | stage two, "
    "1 H100 | 8 H100 | cores a GPU | cache | dense tokens, float16 |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)


ABOVE = """\
These numbers are computed, not measured on a GPU. `python benchmarks/cost.py` writes this page; its docstring lists the
assumptions, and its options (`python benchmarks/cost.py -h`) give a line for another dataset. Stage two is 80,000
iterations of 16 images, as in the paper, in half precision, losses included. Eight GPUs are assumed to be eight times
as fast, and every GPU to have the CPU cores that decode its images: with fewer, the time grows. On the target machine,
`precompute --dry-run` measures the speed instead, and `python -m benchmarks.gpu` that of every part; it is
meant to take less than eight minutes, and has not been run on a GPU yet.
"""
BELOW = f"""\
The cache column is the size before compression: CLS tokens, K-means labels, pseudo labels, region tokens of {GROUPS}
groups per view, and views. Dense tokens are optional ([int8 and principal components take
less](../benchmarks/dense_tokens.md)). Without a cache, every run needs one teacher pass per training image: 1,280,000
passes per run.
"""


def page() -> str:
    jobs = [
        Job(COCO_STUFF, 1, "ViT-B-16", 512, "segformer-b0"),
        Job(COCO_STUFF, 4, "ViT-B-16", 512, "segformer-b4"),
        Job(COCO_STUFF, 8, "ViT-B-16", 512, "segformer-b4"),
        Job(COCO_STUFF, 8, "ViT-B-16", 512, "segnext-b"),
        Job(COCO_STUFF, 8, "ViT-B-16", 512, "swin-b"),
        Job(COCO_STUFF, 8, "ViT-L-14", 448, "segformer-b4"),
    ]
    return "\n".join(["# What COCO-Stuff costs\n", ABOVE, HEADER, *map(line, jobs), "", BELOW])


def write_costs() -> None:
    """The figures in the headers of configs/experiments/."""
    for file in (CONFIGS / "experiments").glob("*.yaml"):
        text = file.read_text()
        if told := re.search(r"# Expected cost.*?([\d,]+) teacher passes.*?--runlocal", text, re.DOTALL):
            config = resolve(config=file)
            images = int(told[1].replace(",", "")) // config.views.count
            settings = (images, config.views.count, "ViT-B-16", config.views.size, config.student.model)
            found = cost(Job(*settings, config.train.iterations, config.train.batch_size))
            line = (
                "# Expected cost on one H100, computed and not measured (docs/cost.md): stage one,\n"
                f"# {told[1]} teacher passes, {duration(found.seconds_one)}; stage two, {duration(found.seconds_two)}. "
            )
            file.write_text(text.replace(told[0], line + "--runlocal"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compute what a dataset costs.")
    parser.add_argument("--images", type=int, help="images in your dataset; without it, files are written")
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--teacher", default="ViT-B-16")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--student", default="segformer-b4")
    asked = parser.parse_args()
    if asked.images is None:
        PAGE.write_text(page())
        write_costs()
    else:
        print(HEADER)
        print(line(Job(asked.images, asked.views, asked.teacher, asked.size, asked.student)))


if __name__ == "__main__":
    main()
