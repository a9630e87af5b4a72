"""Stage two: a student learns from the cache and the images. The teacher is not here, and neither is its library."""

import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from cache.reader import Cache
from configs.errors import UserError
from configs.schema import Config
from pipeline.data.dataset import BrokenFile
from pipeline.data.training import Sample, TrainingViews
from pipeline.learning.criterion import Criterion
from pipeline.student.student import Student
from stages.caches import check_cache
from stages.datasets import open_split
from stages.progress import progress_bar, say
from stages.runs import one_trainer, open_run, save_config, save_student
from stages.training.checkpoints import Checkpoints
from stages.training.learner import Learner, make_learner, seed_generators
from stages.training.log import RunLog, import_wandb, is_validated
from stages.training.pictures import attentions, few
from stages.training.provenance import record_start
from stages.training.stopping import Stopped, outlive_signals, stop_on_signals
from stages.training.validation import Validation

LOG_EVERY = 20


def train(config: Config, cache: Cache, data_root: Path, run: Path | None, device: str) -> Path:
    """Trains the student of `config`, or goes on with it where `run` holds a training with these settings.

    Returns:
        The run's folder: config.yaml, student.safetensors, log.jsonl, scores.jsonl, run.json, checkpoints/ and
        TensorBoard events.

    Raises:
        SystemExit: a signal came; the run is saved. 0 after SIGTERM, 130 after Ctrl-C.
    """
    schedule = config.train
    if schedule.wandb:
        import_wandb()  # or the run would be made first, with a setting that cannot be
    dataset = open_split(config.dataset, data_root, "train")
    check_cache(cache, config, dataset)
    seed_generators(schedule.seed)
    text_features = torch.from_numpy(cache.text_features).to(device)
    student = Student(config.student, text_features.shape[1]).to(device)
    learner = make_learner(config, student, Criterion(config.loss, text_features[dataset.seen_indices]).to(device))
    validation_split = open_split(config.dataset, data_root, schedule.validate_on)
    wanted = slice(config.views.count)  # the cache may hold more views
    views = cache.load("views")[:, wanted]
    cls_tokens = torch.from_numpy(cache.load("cls_tokens")[:, wanted].astype(np.float32))
    groups = torch.from_numpy(cache.load("pseudo_labels")[:, wanted])
    if not len(cache.kept_rows):
        raise UserError(f"cache {cache.location} holds no image that could be read: mend them and precompute again")

    path = open_run(run, config)

    def show_attention(student: Student) -> Image.Image:
        return attentions(student, dataset, few(cache.kept_rows), views, cls_tokens, config.views.size)

    def write_run(folder: Path) -> None:
        save_config(folder, config)
        save_student(folder, learner.best_student, text_features, learner.iteration)

    with one_trainer(path):
        checkpoints = Checkpoints(path, schedule.keep_checkpoints)
        if resumed := _resume(learner, checkpoints):
            write_run(path)
        if learner.iteration == schedule.iterations and is_validated(path, schedule.iterations):
            say(f"run {path} is finished: nothing to do")
            return path
        say(f"run: {path}, from cache {cache.location}" + (f", after iteration {learner.iteration}" if resumed else ""))
        first, started = learner.iteration, time.perf_counter()
        identity = record_start(path, first, cache.location, cache.manifest.fingerprint, device)
        samples = TrainingViews(
            dataset, cache.kept_rows, views, config.views.size, schedule.iterations * schedule.batch_size,
            schedule.seed, student.mean, student.std,
        )  # fmt: skip
        loader = DataLoader(
            samples, schedule.batch_size, sampler=range(first * schedule.batch_size, len(samples)),
            num_workers=schedule.workers, pin_memory=device.startswith("cuda"), worker_init_fn=outlive_signals,
            multiprocessing_context="spawn" if schedule.workers else None,
            generator=torch.Generator(),  # its own: where a run starts must not show in what the student draws
        )  # fmt: skip

        with (
            stop_on_signals() as stop,
            closing(RunLog(path, config, first, identity)) as log,
            closing(_readable(loader)) as batches,
            progress_bar("train", schedule.iterations, "it") as advance,
        ):
            validation = Validation(config, validation_split, text_features, log, stop, show_attention)

            def validate() -> None:
                write_run(path)
                validation(learner.best_student, learner.iteration)
                student.train()
                checkpoints.prune(validation.best)

            student.train()
            advance(first)
            try:
                if first and validation.due(first) and not validation.done(first):
                    validate()
                for batch in batches:
                    lr = learner.lr
                    losses = _step(learner, batch, cls_tokens, groups, dataset.ids, device)
                    iteration = learner.iteration
                    log.losses(iteration, losses, lr)
                    advance(1, f"loss {losses['total']:.3f}" if iteration % LOG_EVERY == 0 else None)
                    if iteration % schedule.checkpoint_every == 0 or validation.due(iteration) or stop:
                        log.flush()
                        checkpoints.save(iteration, learner.state(), write_run)
                        checkpoints.prune(validation.best)
                    stop.check()
                    if validation.due(iteration):
                        validate()
            except Stopped:
                say(f"stopped and saved after iteration {learner.iteration}: train --run {path} goes on")
                raise SystemExit(stop.exit_code) from None
        say(f"trained {schedule.iterations - first} iterations in {time.perf_counter() - started:.0f} s: {path}")
    return path


def _resume(learner: Learner, checkpoints: Checkpoints) -> bool:
    """Puts the learner where the newest good checkpoint was; False where there is none.

    Raises:
        UserError: no checkpoint is good, or they are of another version of this program.
    """
    state = checkpoints.newest()
    if state is None:
        return False
    try:
        learner.restore(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{checkpoints.folder} is of another version of this program ({reason}): choose another --run"
        ) from error
    return True


def _step(
    learner: Learner, batch: dict[str, Tensor], cls_tokens: Tensor, groups: Tensor, ids: list[str], device: str
) -> dict[str, float]:
    """One iteration: the losses by name, and their `total`.

    Args:
        cls_tokens, groups: (N, V, C) and (N, V, G, G), of all images.
        ids: (N,) their names.

    Raises:
        UserError: a loss is NaN or infinite.
    """
    rows, views = batch["row"], batch["view"]
    features, auxiliary = learner.student.with_auxiliary(batch["pixels"].to(device))
    losses = learner.criterion(
        features,
        cls_tokens[rows, views].to(device),
        batch["seen"].to(device),
        groups[rows, views].to(device),
        rows.to(device),
        auxiliary,
    )
    total = torch.stack(list(losses.values())).sum()
    if not torch.isfinite(total):
        values = {name: loss.item() for name, loss in losses.items()}
        wrong = [name for name, value in values.items() if not np.isfinite(value)] or ["total"]
        raise UserError(
            f"iteration {learner.iteration + 1}: loss {', '.join(wrong)} is not finite ({values}) on images "
            f"{[ids[row] for row in rows.tolist()]}: lower train.lr"
        )
    learner.optimizer.zero_grad(set_to_none=True)
    total.backward()
    learner.optimizer.step()
    learner.scheduler.step()
    if learner.ema:
        learner.ema.update_parameters(learner.student)
    learner.iteration += 1
    return {**{name: loss.item() for name, loss in losses.items()}, "total": total.item()}


def _readable(loader: DataLoader[Sample]) -> Generator[dict[str, Tensor], None, None]:
    """The loader's batches. Its workers wrap what they meet in their traceback: only its last line is the user's."""
    try:
        yield from loader  # samples, collated
    except BrokenFile as error:
        raise BrokenFile(str(error).strip().rpartition("BrokenFile: ")[2]) from error
