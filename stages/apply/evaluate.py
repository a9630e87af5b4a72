"""Evaluation: one prediction over all classes, scored on seen and unseen ones. Only the student runs."""

import math
from pathlib import Path

import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import Config
from pipeline.data.dataset import SegmentationDataset
from pipeline.metrics import CalibratedStacking, Scores
from pipeline.student.student import Student
from pipeline.teacher.teacher import Teacher, load_teacher
from stages.apply.gamma import calibrate, count_pixels, open_gamma_split
from stages.apply.predictor import Predictor, student_predictor
from stages.common.datasets import open_split
from stages.common.progress import say
from stages.common.ranks import add_up, everyone_has, is_main, own_share, take_buffers
from stages.common.runs import DATA, Run
from stages.common.text import class_features


def features_of(config: Config, run: Run, device: str) -> tuple[Config, Tensor]:
    """Class features (K, C) for a run on `config.dataset`: the run's, or new ones if the words differ.

    If the dataset's classes differ from those of the training, no class counts as unseen; the returned configuration
    is changed accordingly.
    """
    trained, asked = run.config.dataset, config.dataset
    if all(
        getattr(trained, key) == getattr(asked, key) for key in ("classes", "prompts", "templates", "text_features")
    ):
        return config, run.text_features

    def teacher() -> Teacher:  # only if the words are new
        return load_teacher(config.teacher, device)

    features = torch.from_numpy(class_features(config, teacher, run.text_features.shape[1])).to(device)
    if asked.classes != trained.classes:
        config = config.model_copy(update={"dataset": asked.model_copy(update={"unseen": ()})})
    return config, features


def evaluate_predictor(predict: Predictor, dataset: SegmentationDataset, gammas: list[float]) -> list[Scores]:
    """Scores of a split under each gamma, counted at the masks' own size.

    With torchrun every rank takes its share of the images, and all return the same scores.
    """
    config, rows = dataset.config, own_share(range(len(dataset)))
    seen, unseen = config.seen_indices, config.unseen_indices
    stacking = CalibratedStacking(len(config.classes), seen, unseen, gammas, predict.device)
    what = f"evaluate {dataset.split}"
    add_up(stacking.confusions, lambda: count_pixels(predict, dataset, stacking, what, rows))
    return stacking.scores()


def run_gamma(run: Run, data_root: Path = DATA) -> float:
    """The gamma of a run: the number in its settings, or the one that training chose for these weights.

    If the run has none, it is chosen now, provided its images can be read below `data_root`; otherwise it is NaN, with
    a warning.
    """
    asked = run.config.evaluate.gamma
    if isinstance(asked, str) and run.gamma is not None:
        return run.gamma
    dataset = run.config.dataset
    try:
        if dataset.generator and not (data_root / dataset.root).is_dir():
            raise UserError(f"no folder {data_root / dataset.root}")  # nobody asked to have it rendered
        split = open_gamma_split(run.config, data_root)
    except UserError as error:
        return _without_gamma(str(run), error)
    predict = student_predictor(run.student, run.text_features, run.config)
    return _calibrate(predict, run.config.evaluate.gamma, split, run.student)


def gamma_of(predict: Predictor, config: Config, data_root: Path, run: Run | None = None) -> float:
    """The gamma that `config` asks for; if it and `run` both have `auto`, the run's. `predict` is the run's student.

    Raises:
        UserError: as `open_gamma_split`; but with `auto` and no training images, gamma is NaN, with a warning.
    """
    auto = config.evaluate.gamma == "auto"
    if auto and config.dataset.unseen and run and run.gamma is not None and run.config.evaluate.gamma == "auto":
        return run.gamma
    try:
        split = open_gamma_split(config, data_root)
    except UserError as error:
        if not auto:
            raise
        return _without_gamma(str(run or config.teacher.model), error)
    return _calibrate(predict, config.evaluate.gamma, split, run.student if run else None)


def _calibrate(
    predict: Predictor, asked: float | str, split: SegmentationDataset | None, student: Student | None
) -> float:
    """`calibrate` on the first rank; the others take its gamma and spread."""
    gamma = calibrate(predict, asked, split, student) if is_main() else math.nan
    if student:
        take_buffers(student)
    return everyone_has(gamma)


def _without_gamma(name: str, error: UserError) -> float:
    say(f"warning: no gamma: {name} has none, and it cannot be chosen on images ({error})")
    return math.nan


def evaluate(predict: Predictor, config: Config, data_root: Path, run: Run | None = None) -> tuple[float, Scores]:
    """Gamma, from `gamma_of`, and scores on the split `evaluate.split`.

    Raises:
        UserError: there is no such split; or as `gamma_of`.
    """
    dataset = open_split(config.dataset, data_root, config.evaluate.split)
    gamma = gamma_of(predict, config, data_root, run)
    return gamma, evaluate_predictor(predict, dataset, [gamma])[0]
