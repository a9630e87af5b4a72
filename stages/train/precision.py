"""The student's forward pass and the optimiser's step at `train.precision`, compiled where `train.compile` says so."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from configs.schema import Train
from pipeline.precision import autocast, precision_on
from pipeline.student.student import Student

Forward = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@contextmanager
def fixed_shapes() -> Iterator[None]:
    """Around steps of one shape: cuDNN tries its ways to convolve once. Validation's images have many shapes."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def student_forward(student: Student, schedule: Train) -> Forward:
    """`student.with_auxiliary` under autocast; its features come out as float32.

    The losses stay in float32: NEL sums over every pixel and channel, more than float16 can hold, a bfloat16 has 8 bits
    for the cosines that InfoNCE divides by 0.07, and the teacher's tokens that both are compared with are float32.
    """
    compiled: Forward = torch.compile(student.with_auxiliary) if schedule.compile else student.with_auxiliary

    def forward(pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        with autocast(pixels.device.type, schedule.precision):
            features, auxiliary = compiled(pixels)
        return features.float(), None if auxiliary is None else auxiliary.float()

    return forward


def gradient_scaler(schedule: Train, device: str) -> torch.amp.GradScaler:
    """Keeps small gradients above float16's smallest number; at other precisions it hands everything through."""
    kind = device.partition(":")[0]
    precision = precision_on(kind, schedule.precision)
    # torch's first scale, 65,536, overflows at the first steps, which are then lost.
    return torch.amp.GradScaler(kind, init_scale=2.0**10, enabled=precision == "fp16")
