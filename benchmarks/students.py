"""Parameters and multiplications of every named student, beside what its paper published.

    python benchmarks/students.py    # writes benchmarks/students.md; no weights, no GPU, half a minute

Published models end in a classifier of 150 classes where a student ends in a projection to CLIP's width (512): the
column "as published" is the student with its last layer, which is linear, exchanged in the count. SegFormer's paper
has 768 channels in the heads of B2 to B5 (mmsegmentation, and this package, 256), and an image of 640 for B5.
Swin's has images of 512 x 2048 and an auxiliary head. SegNeXt's count norms and bilinear resizing too, that of the
logits to the image's size included, with fvcore's weights (https://github.com/facebookresearch/fvcore): so counted all
four agree to the last digit that was published.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from configs.schema import Student as StudentConfig
from pipeline.student.families import FAMILIES
from pipeline.student.heads import AllMLPHead
from pipeline.student.student import Student

WIDTH, CLASSES = 512, 150
# Millions of parameters, thousand millions of multiplications (GMAC; papers say FLOPs), at height and width.
PUBLISHED = {
    "segformer-b0": (3.8, 8.4, 512, 512),
    "segformer-b1": (13.7, 15.9, 512, 512),
    "segformer-b2": (27.5, 62.4, 512, 512),
    "segformer-b3": (47.3, 79.0, 512, 512),
    "segformer-b4": (64.1, 95.7, 512, 512),
    "segformer-b5": (84.7, 183.3, 640, 640),
    "segnext-t": (4.3, 6.6, 512, 512),
    "segnext-s": (13.9, 15.9, 512, 512),
    "segnext-b": (27.6, 34.9, 512, 512),
    "segnext-l": (48.9, 70.0, 512, 512),
    "swin-t": (60, 945, 512, 2048),
    "swin-s": (81, 1038, 512, 2048),
    "swin-b": (121, 1188, 512, 2048),
}


aten = torch.ops.aten


def _each(operations: int) -> Any:
    """A count of `operations` for each value of the result; times 2, as torch counts."""

    def count(*shapes: Any, out_shape: Any, **_: Any) -> int:
        shape = out_shape[0] if isinstance(out_shape[0], (list, tuple, torch.Size)) else out_shape
        return 2 * operations * math.prod(shape)

    return count


FVCORE = {
    aten.native_batch_norm: _each(2),
    aten.native_group_norm: _each(5),
    aten.upsample_bilinear2d: _each(4),
}


def gmac(student: Student, height: int, width: int, classes: int = 0) -> float:
    """Of one image, on tensors without values; torch counts a multiplication and an addition as 2.

    `classes`: count as SegNeXt's paper does, that many logits resized to the image included.
    """
    with FlopCounterMode(display=False, custom_mapping=FVCORE if classes else {}) as counter:
        found, _ = student.to("meta").with_auxiliary(torch.zeros(1, 3, height, width, device="meta"))
        if classes:
            torch.nn.functional.interpolate(found[:, :classes], size=(height, width), mode="bilinear")
    return counter.get_total_flops() / 2e9


def count(name: str, channels: int | None, height: int, width: int) -> tuple[float, float]:
    """Millions of parameters and GMAC with the last layers exchanged for classifiers."""
    student = Student(
        StudentConfig(model=name, weights="none", channels=channels, auxiliary=name.startswith("swin")), WIDTH
    ).eval()
    share = CLASSES / WIDTH
    parameters = sum(p.numel() for p in student.parameters())
    multiplications = gmac(student, height, width, CLASSES if name.startswith("segnext") else 0)
    heads = [(student.head, student.stride)] + ([(student.auxiliary_head, 16)] if student.auxiliary_head else [])
    if isinstance(student.head, AllMLPHead):  # which the papers count as if every level were fused at stride 4
        fusing = student.head.fusion_conv[0].out_channels ** 2 * height * width / 16
        multiplications += fusing * (3 - 1 / 4 - 1 / 16 - 1 / 64) / 1e9
    for head, stride in heads:
        last = sum(p.numel() for p in head.project.parameters())
        parameters -= round(last * (1 - share))
        multiplications -= head.project.weight.numel() * (height // stride) * (width // stride) * (1 - share) / 1e9
    return parameters / 1e6, multiplications


def main() -> None:
    lines = [
        "# The named students, beside their papers",
        "",
        "`python benchmarks/students.py`, which says how it counts. Millions of parameters; GMAC: thousand millions of",
        "multiplications (and additions) for one image.",
        "",
        "| student | parameters | GMAC at 512 | as published: parameters | paper | GMAC | paper | image |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in FAMILIES:
        published, operations, height, width = PUBLISHED[name]
        own = Student(StudentConfig(model=name, weights="none"), WIDTH).eval()
        wide = 768 if name in ("segformer-b2", "segformer-b3", "segformer-b4", "segformer-b5") else None
        parameters, multiplications = count(name, wide, height, width)
        cells = [
            name,
            f"{sum(p.numel() for p in own.parameters()) / 1e6:.2f}",
            f"{gmac(own, 512, 512):.1f}",
            f"{parameters:.2f} ({100 * (parameters / published - 1):+.1f} %)",
            f"{published}",
            f"{multiplications:.1f} ({100 * (multiplications / operations - 1):+.1f} %)",
            f"{operations}",
            f"{height} x {width}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    (Path(__file__).parent / "students.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
