"""Stage two: a student learns from the cache and the images. Unless `train.teacher` says so, no teacher is loaded."""

import json
import time
from contextlib import closing
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from cache.reader import Cache
from configs.errors import UserError
from configs.schema import Config
from pipeline.learning.criterion import Criterion
from pipeline.student.student import Student
from stages.caches import check_cache
from stages.datasets import open_split
from stages.evaluate import evaluate_predictor, student_predictor
from stages.progress import progress_bar, say
from stages.runs import new_run, save_config, save_student
from stages.training.batches import Batches
from stages.training.pace import Pace
from stages.training.precision import gradient_scaler, student_forward

LOG_EVERY = 20


def train(config: Config, cache: Cache, data_root: Path, run: Path | None, device: str) -> Path:
    """Trains the student of `config`.

    Returns:
        The run's folder: config.yaml, student.safetensors, log.jsonl, timing.jsonl and TensorBoard events.
    """
    schedule = config.train
    dataset = open_split(config.dataset, data_root, "train")
    check_cache(cache, config, dataset)
    torch.manual_seed(schedule.seed)
    text_features = torch.from_numpy(cache.text_features).to(device)
    student = Student(config.student, text_features.shape[1]).to(device)
    criterion = Criterion(config.loss, text_features[dataset.seen_indices]).to(device)
    validation = open_split(config.dataset, data_root, schedule.validate_on)
    batches = Batches(config, cache, dataset, student.mean, student.std, device)
    forward, scaler = student_forward(student, schedule), gradient_scaler(schedule, device)
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

    path = new_run(run, config.dataset.name)
    save_config(path, config)
    say(f"run: {path}, from cache {cache.location}")
    started = time.perf_counter()
    student.train()
    with (
        SummaryWriter(str(path)) as board,
        (path / "log.jsonl").open("w") as log,
        closing(Pace(path, batches)) as pace,
        progress_bar("train", schedule.iterations, "it") as advance,
    ):
        for iteration, batch in enumerate(batches, start=1):
            features, auxiliary = forward(batch.pixels)
            losses = criterion(features, batch.cls_tokens, batch.seen, batch.groups, batch.rows, auxiliary)
            total = torch.stack(list(losses.values())).sum()
            if not torch.isfinite(total):
                ids = [dataset.ids[row] for row in batch.rows.tolist()]
                raise UserError(
                    f"iteration {iteration}: a loss is not finite ({_values(losses)}) on images {ids}: lower train.lr"
                )
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(total).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            values = {**_values(losses), "total": total.item()}
            log.write(json.dumps({"iteration": iteration, **values}) + "\n")
            for name, value in values.items():
                board.add_scalar(f"loss/{name}", value, iteration)
            pace.step(iteration)
            advance(1, f"loss {values['total']:.3f}, {pace.note()}" if iteration % LOG_EVERY == 0 else None)
            if iteration % schedule.validate_every == 0 or iteration == schedule.iterations:
                log.flush()
                save_student(path, student, text_features, iteration)
                predict = student_predictor(student.eval(), text_features, config)
                scores = evaluate_predictor(predict, validation, [0.0])[0]
                student.train()
                shown = ("miou", "miou_seen", "miou_unseen", "hiou") if config.dataset.unseen else ("miou",)
                for name in shown:
                    board.add_scalar(f"{validation.split}/{name}", getattr(scores, name), iteration)
                values_shown = ", ".join(f"{name} {getattr(scores, name):.1f}" for name in shown)
                say(f"iteration {iteration}, {validation.split}, gamma 0: {values_shown}")
    say(f"trained {schedule.iterations} iterations in {time.perf_counter() - started:.0f} s: {path}")
    return path


def warm_up_and_poly(step: int, warmup: int, iterations: int) -> float:
    """Learning-rate factor: linear from ~0 over `warmup` iterations, times poly decay of power 1 to 0."""
    return min(1.0, (step + 1) / (warmup + 1)) * (1 - step / iterations)


def _values(losses: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: loss.item() for name, loss in losses.items()}
