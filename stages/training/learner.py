"""What a training step changes, as one value that can be saved and restored to the bit."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from configs.schema import Config
from pipeline.learning.criterion import Criterion
from pipeline.student.student import Student


@dataclass
class Learner:
    """Everything that decides how a training goes on, besides its settings; samples follow from `iteration` alone.

    Attributes:
        ema: the exponential moving average of the student's weights, where `train.ema` is on; norms' running statistics
            are the student's latest.
        scaler: of float16 gradients, where there is one.
        iteration: steps taken.
    """

    student: Student
    criterion: Criterion
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: AveragedModel | None = None
    scaler: torch.amp.GradScaler | None = None
    iteration: int = 0

    @property
    def lr(self) -> float:
        """The encoder's learning rate at the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def best_student(self) -> Student:
        """The student to evaluate and to keep: the average where there is one."""
        return self.ema.module if self.ema else self.student  # type: ignore[return-value]

    def state(self) -> dict[str, Any]:
        """Nested dicts and lists of tensors and plain values."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return {**parts, "bank": self.criterion.bank.state(), "random": random_state(), "iteration": self.iteration}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` returned, here or in another process."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                # Saved tensors are contiguous, but sums of mixed memory formats may differ in their last bit.
                if torch.is_tensor(value) and value.ndim > 1:
                    moments[name] = torch.empty_like(parameter).copy_(value)
        self.criterion.bank.restore(state["bank"], self.criterion.alpha.device)
        restore_random_state(state["random"])
        self.iteration = state["iteration"]

    def _parts(self) -> dict[str, Any]:
        parts = {
            "student": self.student, "criterion": self.criterion, "optimizer": self.optimizer,
            "scheduler": self.scheduler, "ema": self.ema, "scaler": self.scaler,
        }  # fmt: skip
        return {name: part for name, part in parts.items() if part is not None}


def make_learner(config: Config, student: Student, criterion: Criterion) -> Learner:
    """AdamW over student and criterion, and the schedule of `config.train`."""
    schedule = config.train
    factor = schedule.head_lr_factor or student.head_lr_factor
    optimizer = torch.optim.AdamW(
        [
            *student.parameter_groups(schedule.lr, factor, schedule.weight_decay),
            {"params": list(criterion.parameters()), "lr": schedule.lr * factor, "weight_decay": 0.0},
        ]
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warm_up_and_poly(step, schedule.warmup, schedule.iterations)
    )
    ema = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(schedule.ema)) if schedule.ema else None
    return Learner(student, criterion, optimizer, scheduler, ema.eval() if ema else None)


def warm_up_and_poly(step: int, warmup: int, iterations: int) -> float:
    """Learning-rate factor: linear from ~0 over `warmup` iterations, times poly decay of power 1 to 0."""
    return min(1.0, (step + 1) / (warmup + 1)) * (1 - step / iterations)


def seed_generators(seed: int) -> None:
    """Every generator that a step could draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """Of the same generators."""
    numpy_state: Any = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in numpy_state],
        "python": random.getstate(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Leaves a GPU's generator as it is where the state holds another number of them."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(tuple(state["numpy"]))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
