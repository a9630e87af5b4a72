"""Pictures of a student that is learning, of the same few images each time."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.data.dataset import SegmentationDataset
from pipeline.data.views import normalise, padding_colour, replay
from pipeline.inference import ClassLogits
from pipeline.learning.glm import attention
from pipeline.metrics import calibrated_argmax
from pipeline.pictures import contact_sheet, overlay
from pipeline.student.student import Student

COUNT, SIDE = 4, 128  # images, and pixels along the longer side of one


def few(rows: Sequence[int] | np.ndarray) -> list[int]:
    """`COUNT` of them, evenly spread."""
    step = max(1, len(rows) // COUNT)
    return [int(row) for row in rows[::step][:COUNT]]


def predictions(dataset: SegmentationDataset, logits: dict[int, ClassLogits]) -> Image.Image:
    """Image, true mask and prediction at gamma 0, of the rows of `dataset` that `logits` holds."""
    lines = []
    for row, found in logits.items():
        image, mask = dataset.pair(row)
        seen, unseen = dataset.config.seen_indices, dataset.config.unseen_indices
        labels = calibrated_argmax(found, mask.shape, seen, unseen, [0.0])[0].astype(np.uint8)
        lines.append([image, overlay(image, mask, 0.75), overlay(image, labels, 0.75)])
    return contact_sheet(lines, ("image", "true mask", "prediction"), [dataset.ids[row] for row in logits], SIDE)


@torch.no_grad()
def attentions(
    student: Student, dataset: SegmentationDataset, rows: list[int], views: np.ndarray, cls_tokens: Tensor, size: int
) -> Image.Image:
    """GLM's attention W (Eq. 1) of CLS tokens to the student's features; `student` is in eval mode.

    `rows` are images of the training split, whose first `views` (N, V, 5) and `cls_tokens` (N, V, C) the cache knows.
    """
    lines = []
    for row in rows:
        shown = replay(views[row, 0], dataset.image(row), size, padding_colour(student.mean))
        device = next(student.parameters()).device
        features = student(normalise(shown[None], student.mean, student.std).to(device))
        weights = attention(features, cls_tokens[row, :1].to(device)).view(features.shape[2:])
        lines.append([shown, _heat(weights.float().cpu(), shown)])
    return contact_sheet(lines, ("image", "attention"), [dataset.ids[row] for row in rows], SIDE)


def _heat(weights: Tensor, image: np.ndarray) -> np.ndarray:
    """The image as grey, red where the weights (h, w) are near their maximum."""
    small = (weights / weights.max().clamp(min=1e-12)).mul(255).round().to(torch.uint8).numpy()
    share = np.asarray(Image.fromarray(small).resize(image.shape[1::-1], Image.Resampling.NEAREST))[..., None] / 255
    grey = image.mean(axis=2, keepdims=True).repeat(3, axis=2)
    return np.asarray((grey * (1 - share) + np.array([255, 0, 0]) * share).round().astype(np.uint8))
