"""Evaluation: one prediction among all classes, scored on seen and unseen ones. The student runs alone."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import Config
from pipeline.data.dataset import SegmentationDataset
from pipeline.inference import Classifier, ClassLogits, class_logits, short_side_to, sliding, whole
from pipeline.metrics import CalibratedStacking, Scores, seen_margins
from pipeline.student.student import Student
from stages.datasets import open_split
from stages.progress import progress_bar
from stages.runs import Run
from stages.text import class_features

if TYPE_CHECKING:
    from pipeline.teacher.clip import FrozenClip

GAMMAS = 60  # candidates of the gamma search: quantiles of the margins on 20 images, and 0

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
    """The teacher's own zero-shot dense prediction among the classes of `config.dataset`."""
    from pipeline.teacher.clip import FrozenClip  # only here: nothing else in evaluation may load CLIP

    teacher = FrozenClip(config.teacher, device)
    return dense_predictor(teacher, torch.from_numpy(class_features(config, lambda: teacher)).to(device), config)


def dense_predictor(teacher: "FrozenClip", text_features: Tensor, config: Config) -> Predictor:
    """Cosine of the teacher's dense tokens and `text_features` (K, C)."""

    def classify(pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        _, dense = teacher.encode(nn.functional.pad(pixels, (0, -width % teacher.stride, 0, -height % teacher.stride)))
        return torch.einsum("bhwc,kc->bkhw", nn.functional.normalize(dense, dim=-1), text_features)

    return _predictor(config, classify, teacher.stride, teacher.mean, teacher.std)


def features_of(config: Config, run: Run, device: str) -> tuple[Config, Tensor]:
    """Class features (K, C) for a run on `config.dataset`: the run's own, or new ones where other words are asked for.

    Of a dataset with other classes than the run was trained on no class counts as seen or unseen, all are alike: the
    configuration that is returned says so.
    """
    trained, asked = run.config.dataset, config.dataset
    if all(
        getattr(trained, key) == getattr(asked, key) for key in ("classes", "prompts", "templates", "text_features")
    ):
        return config, run.text_features

    def teacher() -> "FrozenClip":
        from pipeline.teacher.clip import FrozenClip  # the text tower only, and only if the words are new

        return FrozenClip(config.teacher, device)

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


def best_gamma(predict: Predictor, config: Config, data_root: Path) -> float:
    """The gamma of the best hIoU on the split `holdout`, never on the split that is reported."""
    seen, unseen = config.dataset.seen_indices, config.dataset.unseen_indices
    if not unseen:
        return 0.0
    if "holdout" not in config.dataset.splits:
        raise UserError(f"evaluate.gamma=auto needs a split `holdout` in dataset {config.dataset.name}: give a number")
    dataset = open_split(config.dataset, data_root, "holdout")
    rows = range(0, len(dataset), max(1, len(dataset) // 20))
    margins = np.concatenate([seen_margins(predict(dataset.image(row)), seen, unseen) for row in rows])
    gammas = sorted({0.0, *np.quantile(margins, np.linspace(0, 1, GAMMAS)).tolist()})
    found = evaluate_predictor(predict, dataset, gammas)
    return gammas[int(np.argmax([scores.hiou for scores in found]))]


def evaluate(predict: Predictor, config: Config, data_root: Path) -> tuple[float, Scores]:
    """Gamma and scores on the split `evaluate.split`."""
    dataset = open_split(config.dataset, data_root, config.evaluate.split)
    gamma = config.evaluate.gamma
    chosen = best_gamma(predict, config, data_root) if gamma == "auto" else float(gamma)
    return chosen, evaluate_predictor(predict, dataset, [chosen])[0]
