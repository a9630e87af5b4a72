"""The training step, and all state it changes, which can be saved and restored bit by bit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from configs.errors import UserError
from configs.schema import Config, Train
from pipeline.learning.criterion import Criterion
from pipeline.learning.ranks import average_gradients, averaged, gathered, rank
from pipeline.student.student import Student
from pipeline.transfer import Fetch
from stages.train.batches import Batch
from stages.train.precision import Forward, gradient_scaler, student_forward


@dataclass
class Learner:
    """The complete state of a training, apart from its settings.

    Samples and random numbers depend only on `iteration`: every step has its own seeds.

    Attributes:
        ema: the exponential moving average of the student's weights, where `train.ema` is on; norms' running statistics
            are the student's latest.
        scaler: for float16 gradients.
        iteration, iterations: steps done, and steps in total.
        gamma: of `best_student`; None until a validation chooses it, and again after the next step.
        stopping: whether a rank was told to stop before the last step.
    """

    student: Student
    criterion: Criterion
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    forward: Forward
    seed: int
    iterations: int
    ema: AveragedModel | None = None
    iteration: int = 0
    gamma: float | None = None
    stopping: bool = False

    @property
    def lr(self) -> float:
        """The encoder's learning rate at the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def best_student(self) -> Student:
        """The student to evaluate and save: the moving average if it is on."""
        return self.ema.module if self.ema else self.student  # type: ignore[return-value]

    def step(self, parts: Sequence[Batch], ids: Sequence[str], stop: bool = False) -> dict[str, float]:
        """Run one iteration; returns the losses by name and their `total`, for the whole batch.

        A GPU is waited for once, when it has been told all there is to do, and then for the forward pass alone.

        Args:
            parts: the batch, or this rank's share of it, whole or in micro-batches, whose losses are averaged.
            ids: of all images of the dataset, for error messages.
            stop: whether this rank was told to stop.

        Raises:
            UserError: a loss is NaN or infinite. The weights are then spoilt and must not be saved.
        """
        self.optimizer.zero_grad(set_to_none=True)
        progress = self.iteration / self.iterations
        fetched: list[Fetch] = []
        for number, part in enumerate(parts):
            torch.manual_seed(_seed(self.seed, self.iteration, number, 1 + rank()))
            features, auxiliary = self.forward(part.pixels)
            torch.manual_seed(_seed(self.seed, self.iteration, number, 0))  # all ranks synthesize the same prototypes
            losses = self.criterion(
                features, part.cls_tokens, part.seen, part.groups, part.rows, part.region_tokens, auxiliary, progress,
                on_cpu=part.on_cpu,
            )  # fmt: skip
            stacked = torch.stack(list(losses.values()))
            fetched.append(Fetch(averaged(torch.cat([stacked.detach(), stacked.new_full((1,), stop)]))))
            self.scaler.scale(stacked.sum() / len(parts)).backward()
        average_gradients([*self.student.parameters(), *self.criterion.parameters()])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        if self.ema:
            self.ema.update_parameters(self.student)
        total: dict[str, float] = dict.fromkeys(losses, 0.0)
        for part, fetch in zip(parts, fetched, strict=True):
            *shown, stopping = fetch.wait().tolist()
            if not np.isfinite(shown).all():
                self._refuse(dict(zip(losses, shown, strict=True)), gathered(part.rows), ids)
            self.stopping = stopping > 0
            for name, value in zip(losses, shown, strict=True):
                total[name] += value / len(parts)
        self.iteration += 1
        self.gamma = None
        return {**total, "total": sum(total.values())}

    def _refuse(self, losses: dict[str, float], rows: Tensor, ids: Sequence[str]) -> None:
        wrong = ", ".join(name for name, value in losses.items() if not np.isfinite(value))
        raise UserError(
            f"iteration {self.iteration + 1}: loss {wrong} is not finite ({losses}) on images "
            f"{[ids[row] for row in rows.tolist()]}: lower train.lr, in another --run"
        )

    def state(self) -> dict[str, Any]:
        """Nested dicts and lists of tensors and plain values."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return {**parts, "bank": self.criterion.bank.state(), "iteration": self.iteration, "gamma": self.gamma}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned, in this or another process."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                # Saved tensors are contiguous, but sums of mixed memory formats may differ in their last bit.
                if torch.is_tensor(value) and value.ndim > 1:
                    moments[name] = torch.empty_like(parameter).copy_(value)
        self.criterion.bank.restore(state["bank"], self.criterion.alpha.device)
        self.iteration, self.gamma = state["iteration"], state.get("gamma")  # older checkpoints have none

    def _parts(self) -> dict[str, Any]:
        parts = {
            "student": self.student, "criterion": self.criterion, "optimizer": self.optimizer,
            "scheduler": self.scheduler, "ema": self.ema, "scaler": self.scaler,
        }  # fmt: skip
        return {name: part for name, part in parts.items() if part is not None}


def make_learner(config: Config, student: Student, criterion: Criterion, device: str) -> Learner:
    """AdamW for student and criterion, with the schedule of `config.train`."""
    schedule = config.train
    factor = schedule.head_lr_factor or student.head_lr_factor
    optimizer = torch.optim.AdamW(
        [
            *student.parameter_groups(schedule.lr, factor, schedule.weight_decay),
            {"params": list(criterion.parameters()), "lr": schedule.lr * factor, "weight_decay": 0.0},
        ],
        fused=device.startswith("cuda") or None,  # in one kernel, which a scaler need not wait for either
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warm_up_and_poly(step, schedule.warm_up, schedule.iterations)
    )
    ema = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(schedule.ema)) if schedule.ema else None
    return Learner(
        student, criterion, optimizer, scheduler, gradient_scaler(schedule, device), student_forward(student, schedule),
        schedule.seed, schedule.iterations, ema.eval() if ema else None,
    )  # fmt: skip


def warm_up_and_poly(step: int, warmup: int, iterations: int) -> float:
    """Learning-rate factor: linear from ~0 over `warmup` iterations, times poly decay of power 1 to 0."""
    return min(1.0, (step + 1) / (warmup + 1)) * (1 - step / iterations)


def out_of_proportion(schedule: Train) -> list[str]:
    """A warning for each setting of the schedule that needs more iterations."""
    lines, best = [], min(schedule.warm_up, (schedule.iterations - 1) // 2)  # the step of the highest rate
    peak = warm_up_and_poly(best, schedule.warm_up, schedule.iterations)
    if peak < 0.5:
        lines.append(
            f"train.warmup {schedule.warm_up:,} is out of proportion to train.iterations {schedule.iterations:,}: the "
            f"learning rate reaches at most {peak:.0%} of train.lr; unset, it is 7.5 % of the iterations"
        )
    if schedule.ema and 1 / (1 - schedule.ema) > schedule.iterations / 2:
        lines.append(
            f"train.ema {schedule.ema} averages over {1 / (1 - schedule.ema):,.0f} iterations, of "
            f"{schedule.iterations:,} in total, so the initial random weights stay in the average: lower it"
        )
    return lines


def _seed(*numbers: int) -> int:
    """A seed for torch.manual_seed; other numbers give other seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
