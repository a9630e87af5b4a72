"""Evaluation: one prediction over all classes, scored on seen and unseen ones. Only the student runs."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import Config
from pipeline.data.dataset import SegmentationDataset
from pipeline.gamma import SPREAD, feature_covariance
from pipeline.inference import Classifier, ClassLogits, class_logits, short_side_to, sliding, whole
from pipeline.metrics import CalibratedStacking, Scores
from pipeline.student.student import Student
from pipeline.teacher.teacher import Teacher, load_teacher
from stages.apply.gamma import choose_gamma, gamma_pairs, open_gamma_split
from stages.common.datasets import open_split
from stages.common.progress import progress_bar, say
from stages.common.runs import DATA, Run
from stages.common.text import class_features

# An image (H, W, 3) uint8 -> its class logits, the short side at views.size.
Predictor = Callable[[np.ndarray], ClassLogits]


def _predictor(
    config: Config, classify: Classifier, stride: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> Predictor:
    def predict(image: np.ndarray) -> ClassLogits:
        resized = short_side_to(image, config.views.size)
        height, width = resized.shape[:2]
        if config.evaluate.mode == "whole":
            boxes = whole(height, width)
        else:
            boxes = sliding(height, width, config.views.size, config.evaluate.stride)
        return class_logits(resized, classify, stride, mean, std, boxes)

    return predict


def student_predictor(student: Student, text_features: Tensor, config: Config) -> Predictor:
    """The student alone, in eval mode; `text_features` (K, C) are those of `config.dataset`."""

    def classify(pixels: Tensor) -> Tensor:
        return student.classify(pixels.to(text_features.device), text_features)

    return _predictor(config, classify, student.stride, student.mean, student.std)


def teacher_predictor(config: Config, device: str) -> Predictor:
    """The teacher's zero-shot dense prediction over the classes of `config.dataset`."""
    teacher = load_teacher(config.teacher, device)
    return dense_predictor(teacher, torch.from_numpy(class_features(config, lambda: teacher)).to(device), config)


def dense_predictor(teacher: Teacher, text_features: Tensor, config: Config) -> Predictor:
    """Cosine of the teacher's dense tokens and `text_features` (K, C)."""

    def classify(pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        _, dense = teacher.encode(nn.functional.pad(pixels, (0, -width % teacher.stride, 0, -height % teacher.stride)))
        return torch.einsum("bhwc,kc->bkhw", nn.functional.normalize(dense, dim=-1), text_features)

    return _predictor(config, classify, teacher.stride, teacher.mean, teacher.std)


def set_spread(
    student: Student, config: Config, split: SegmentationDataset | None,
    wrap: Callable[[Predictor], Predictor] = lambda predict: predict,
) -> None:  # fmt: skip
    """With `evaluate.gamma=auto`, calibrate the student on `split`, that of `open_gamma_split` (pipeline/gamma.py)."""
    if split is None or config.evaluate.gamma != "auto":
        return
    encode = wrap(_predictor(config, student, student.stride, student.mean, student.std))  # R in place of logits

    def features() -> Iterator[np.ndarray]:
        for image, _ in gamma_pairs(split):
            for window in encode(image).windows:
                yield window.logits[:, ::2, ::2].flatten(1).float().cpu().numpy()

    student.spread.copy_(torch.from_numpy(SPREAD**2 * feature_covariance(features())))


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
    """Scores of a split under each gamma; confusion is accumulated image by image at the masks' own size."""
    config = dataset.config
    stacking = CalibratedStacking(len(config.classes), config.seen_indices, config.unseen_indices, gammas)
    with progress_bar(f"evaluate {dataset.split}", len(dataset), "images") as advance:
        for row in range(len(dataset)):
            image, mask = dataset.pair(row)
            stacking.update(predict(image), mask)
            advance()
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
    set_spread(run.student, run.config, split)
    return choose_gamma(student_predictor(run.student, run.text_features, run.config), run.config, split)


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
    if run:
        set_spread(run.student, config, split)
    return choose_gamma(predict, config, split)


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
