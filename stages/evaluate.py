"""Evaluation: one prediction among all classes, scored on seen and unseen ones. The student runs alone."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from configs.errors import UserError
from configs.schema import Config
from pipeline.data.dataset import SegmentationDataset
from pipeline.data.views import normalise
from pipeline.metrics import CalibratedStacking, Scores, seen_margins
from pipeline.student.student import Student, class_logits
from stages.progress import progress_bar

GAMMAS = 60  # candidates of the gamma search: quantiles of the margins on 20 images, and 0

# An image (H, W, 3) uint8 -> logits (K, H, W).
Predictor = Callable[[np.ndarray], Tensor]


def student_predictor(student: Student, text_features: Tensor, size: int, device: str) -> Predictor:
    """The whole image at once, its short side brought to `size` with the ratio kept."""

    @torch.inference_mode()
    def predict(image: np.ndarray) -> Tensor:
        height, width = image.shape[:2]
        scale = size / min(height, width)
        shown = Image.fromarray(image).resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
        features = student(normalise(np.asarray(shown)[None], student.mean, student.std).to(device))
        return class_logits(features, text_features, (height, width))[0]

    return predict


def teacher_predictor(config: Config, device: str) -> Predictor:
    """The teacher's own zero-shot dense prediction: cosine of its dense tokens and the class features."""
    from pipeline.teacher.clip import FrozenClip  # only here: nothing else in evaluation may load CLIP

    size = config.views.size
    teacher = FrozenClip(config.teacher, size, device)
    text_features = teacher.text_features(config.dataset.classes, config.dataset.templates)

    @torch.inference_mode()
    def predict(image: np.ndarray) -> Tensor:
        shown = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
        _, dense = teacher.encode(normalise(shown[None], teacher.mean, teacher.std))
        features = torch.nn.functional.normalize(dense, dim=-1).permute(0, 3, 1, 2)
        return class_logits(features, text_features, image.shape[:2])[0]

    return predict


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


def evaluate_student(
    student: Student, text_features: Tensor, dataset: SegmentationDataset, size: int, gammas: list[float], device: str
) -> list[Scores]:
    return evaluate_predictor(student_predictor(student, text_features, size, device), dataset, gammas)


def best_gamma(predict: Predictor, config: Config, data_root: Path) -> float:
    """The gamma of the best hIoU on the split `holdout`, never on the split that is reported."""
    if "holdout" not in config.dataset.splits:
        raise UserError(f"evaluate.gamma=auto needs a split `holdout` in dataset {config.dataset.name}: give a number")
    dataset = SegmentationDataset(config.dataset, data_root, "holdout")
    seen, unseen = config.dataset.seen_indices, config.dataset.unseen_indices
    if not unseen:
        return 0.0
    rows = range(0, len(dataset), max(1, len(dataset) // 20))
    margins = np.concatenate([seen_margins(predict(dataset.image(row)), seen, unseen) for row in rows])
    gammas = sorted({0.0, *np.quantile(margins, np.linspace(0, 1, GAMMAS)).tolist()})
    found = evaluate_predictor(predict, dataset, gammas)
    return gammas[int(np.argmax([scores.hiou for scores in found]))]


def evaluate(predict: Predictor, config: Config, data_root: Path) -> tuple[float, Scores]:
    """Gamma and scores on the split `evaluate.split`."""
    dataset = SegmentationDataset(config.dataset, data_root, config.evaluate.split)
    gamma = config.evaluate.gamma
    chosen = best_gamma(predict, config, data_root) if gamma == "auto" else float(gamma)
    return chosen, evaluate_predictor(predict, dataset, [chosen])[0]
