"""Stage two: trains a student on the cache and the images. The teacher is only loaded if `train.teacher` says so."""

import time
from contextlib import closing, nullcontext, suppress
from pathlib import Path

import torch
from PIL import Image

from cache.reader import Cache
from configs.errors import UserError, reason
from configs.schema import Config
from pipeline.learning.criterion import Criterion
from pipeline.learning.ranks import world_size
from pipeline.student.student import Student, is_synchronised
from stages.apply.gamma import open_gamma_split
from stages.common.caches import check_cache
from stages.common.datasets import open_split, open_training_split
from stages.common.progress import progress_bar, say
from stages.common.ranks import OtherRankFailed, everyone_has, is_main, ranks, take_buffers
from stages.common.runs import begin_run, one_trainer, run_folder, save_config, save_student
from stages.train.batches import Batches, CannotLoad
from stages.train.checkpoints import Checkpoints
from stages.train.learner import Learner, make_learner, out_of_proportion
from stages.train.log import RunLog, import_wandb, is_validated
from stages.train.pace import Pace
from stages.train.pictures import attentions, few
from stages.train.precision import fixed_shapes
from stages.train.provenance import check_same_cache, record_start
from stages.train.ranks import anywhere, wait_for_all
from stages.train.stopping import Stopped, outlive_signals, stop_on_signals
from stages.train.validation import Validation

LOG_EVERY = 20


def train(config: Config, cache: Cache, data_root: Path, run: Path | None, device: str) -> Path:
    """Train the student of `config`, or continue if `run` contains a training with these settings.

    With torchrun, each process handles its share of every batch, and the first one writes the run.

    Returns:
        The run's folder: config.yaml, student.safetensors, log.jsonl, scores.jsonl, timing.jsonl, run.json,
        checkpoints/ and TensorBoard events.

    Raises:
        SystemExit: after a signal, with the run saved; 0 for SIGTERM, 130 for Ctrl-C.
    """
    with ranks(device) as own_device:
        return _train(config, cache, data_root, run, own_device)


def _train(config: Config, cache: Cache, data_root: Path, run: Path | None, device: str) -> Path:
    schedule = config.train
    if schedule.wandb:
        import_wandb()  # or the run would be made first, with a setting that cannot be
    try:
        share = 1 if is_synchronised(config.student.batch_norm) else world_size()
        config.check_images_at_once(schedule.batch_size // schedule.accumulate // share)
    except ValueError as error:
        raise UserError(f"{error} ({world_size()} processes share a batch)") from error
    for line in out_of_proportion(schedule):
        say(f"warning: {line}")
    dataset = open_training_split(config.dataset, data_root)
    check_cache(cache, config, dataset)
    if device.startswith("cuda") and schedule.teacher == "cached":  # a live teacher computes as in stage one
        torch.set_float32_matmul_precision("high")  # of what stays float32
    torch.manual_seed(schedule.seed)
    text_features = torch.from_numpy(cache.text_features).to(device)
    student = Student(config.student, text_features.shape[1]).to(device)
    if schedule.checkpointing:
        student.recompute_blocks()
    criterion = Criterion(config.loss, text_features[config.dataset.seen_channels], schedule.accumulate).to(device)
    learner = make_learner(config, student, criterion, device)
    validation_split = open_split(config.dataset, data_root, schedule.validate_on)
    gamma_split = open_gamma_split(config, data_root)
    path = Path(everyone_has(str(run_folder(run, config)) if is_main() else ""))

    def show_attention(student: Student) -> Image.Image:
        return attentions(student, dataset, cache, few(cache.kept_rows), config.views.size)

    def write_run(folder: Path) -> None:
        save_config(folder, config)
        alpha = float(criterion.alpha.detach())
        save_student(folder, learner.best_student, text_features, learner.iteration, learner.gamma, alpha)

    with one_trainer(path) if is_main() else nullcontext():
        if is_main():
            begin_run(path, config)
        checkpoints = Checkpoints(path, schedule.keep_checkpoints)
        if is_main() and (resumed := _resume(learner, checkpoints)):
            check_same_cache(path, cache)
            write_run(path)
        wait_for_all()
        if not is_main():  # only now are the damaged ones gone
            resumed = _resume(learner, checkpoints)
        if learner.iteration == schedule.iterations and is_validated(path, schedule.iterations):
            say(f"run {path} is finished: nothing to do")
            return path
        say(f"run: {path}, from cache {cache.location}" + (f", after iteration {learner.iteration}" if resumed else ""))
        first, started = learner.iteration, time.perf_counter()
        batches = Batches(config, cache, dataset, student.mean, student.std, device, first, outlive_signals)
        with (
            stop_on_signals() as stop,
            closing(batches),
            progress_bar("train", schedule.iterations, "it", first) as advance,
            closing(_Writer(config, path, first, cache, device, batches)) if is_main() else nullcontext() as writer,
        ):
            log = writer.log if writer else None
            validation = Validation(config, validation_split, gamma_split, text_features, log, stop, show_attention)

            def choose_gamma() -> float:
                if learner.gamma is None:
                    learner.gamma = validation.choose_gamma(learner.best_student)
                return learner.gamma

            def save() -> None:
                if writer:
                    if due() and not stop:  # first, for the checkpoint holds it; a signal does not wait for it
                        with suppress(Stopped):
                            choose_gamma()
                    writer.log.flush()
                    checkpoints.save(learner.iteration, learner.state(), write_run)
                    checkpoints.prune(validation.best)

            def validate() -> None:
                if writer:
                    with suppress(Stopped):
                        choose_gamma()
                        write_run(path)
                if not anywhere(bool(stop), device):
                    gamma = everyone_has(learner.gamma)
                    assert gamma is not None  # only a signal keeps it from being chosen
                    take_buffers(learner.best_student)
                    with suppress(Stopped, OtherRankFailed):
                        validation(learner.best_student, learner.iteration, gamma)
                        if writer:
                            checkpoints.prune(validation.best)
                student.train()
                if anywhere(bool(stop), device):
                    raise Stopped

            def due() -> bool:
                return learner.iteration % schedule.validate_every == 0 or learner.iteration == schedule.iterations

            student.train()
            try:
                if first and anywhere(writer is not None and due() and not validation.done(first), device):
                    validate()
                for parts in batches:
                    lr = learner.lr
                    with fixed_shapes():
                        losses = learner.step(parts, dataset.ids, bool(stop))
                    if writer:
                        writer.step(learner.iteration, losses, lr)
                        noted = learner.iteration % LOG_EVERY == 0
                        advance(1, f"loss {losses['total']:.3f}, {writer.pace.note()}" if noted else None)
                    # Ranks stop together, after the step that all knew of; a single process after this one.
                    stopping = learner.stopping if world_size() > 1 else bool(stop)
                    if stopping or due() or learner.iteration % schedule.checkpoint_every == 0:
                        save()
                    if stopping:
                        raise Stopped
                    if due():
                        validate()
            except CannotLoad as error:
                if learner.iteration > first and learner.iteration not in checkpoints.iterations():
                    save()
                more = f" (saved after iteration {learner.iteration}: to continue, run train --run {path})"
                raise UserError(f"{error}{more if checkpoints.iterations() else ''}") from error
            except Stopped:
                say(f"stopped and saved after iteration {learner.iteration}: to continue, run train --run {path}")
                raise SystemExit(stop.exit_code) from None
        say(f"trained {schedule.iterations - first} iterations in {time.perf_counter() - started:.0f} s: {path}")
    return path


class _Writer:
    """Writes a run's logs and pictures."""

    def __init__(self, config: Config, path: Path, first: int, cache: Cache, device: str, batches: Batches) -> None:
        identity = record_start(path, first, cache.location, cache.manifest.fingerprint, device)
        self.log = RunLog(path, config, first, identity)
        self.pace = Pace(path, batches, first)

    def step(self, iteration: int, losses: dict[str, float], lr: float) -> None:
        self.log.losses(iteration, losses, lr)
        self.pace.step(iteration)

    def close(self) -> None:
        with closing(self.pace):
            self.log.close()


def _resume(learner: Learner, checkpoints: Checkpoints) -> bool:
    """Restore the learner from the newest good checkpoint; False if there are no checkpoints.

    Raises:
        UserError: no checkpoint is good, or they were written by another version of clip-zss.
    """
    state = checkpoints.newest()
    if state is None:
        return False
    try:
        learner.restore(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{checkpoints.folder} was written by another version of clip-zss ({reason(error)}): choose another --run"
        ) from error
    return True
