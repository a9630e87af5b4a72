"""Pictures of the student during training, always of the same few images."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from cache.reader import Cache
from pipeline.data.dataset import SegmentationDataset
from pipeline.data.views import normalise, padding_colour, replay
from pipeline.inference import ClassLogits
from pipeline.learning.glm import attention
from pipeline.metrics import predicted_mask
from pipeline.pictures import contact_sheet, lit, overlay
from pipeline.student.student import Student

COUNT, SIDE = 4, 128  # images, and pixels along the longer side of one


def few(rows: Sequence[int] | np.ndarray) -> list[int]:
    """Choose `COUNT` of them, evenly spaced."""
    step = max(1, len(rows) // COUNT)
    return [int(row) for row in rows[::step][:COUNT]]


def predictions(dataset: SegmentationDataset, logits: dict[int, ClassLogits], gamma: float) -> Image.Image:
    """Image, true mask and prediction at this gamma, of the rows of `dataset` that `logits` holds."""
    lines = []
    for row, found in logits.items():
        image, mask = dataset.pair(row)
        seen, unseen = dataset.config.seen_indices, dataset.config.unseen_indices
        labels = predicted_mask(found, (mask.shape[0], mask.shape[1]), seen, unseen, gamma)
        lines.append([image, overlay(image, mask, 0.75), overlay(image, labels, 0.75)])
    return contact_sheet(lines, ("image", "true mask", "prediction"), [dataset.ids[row] for row in logits], SIDE)


@torch.no_grad()
def attentions(student: Student, dataset: SegmentationDataset, cache: Cache, rows: list[int], size: int) -> Image.Image:
    """GLM's attention W (Eq. 1) of CLS tokens to the student's features; `student` is in eval mode.

    `rows` are images of the training split, of which the first view is shown.
    """
    lines = []
    for row in rows:
        shown = replay(cache.read("views", row)[0], dataset.image(row), size, padding_colour(student.mean))
        device = next(student.parameters()).device
        features = student(normalise(shown[None], student.mean, student.std).to(device))
        cls_token = torch.from_numpy(cache.read("cls_tokens", row)[:1]).to(device).float()
        weights = attention(features, cls_token).view(features.shape[2:])
        lines.append([shown, lit(shown, weights.float().cpu().numpy())])
    return contact_sheet(lines, ("image", "attention"), [dataset.ids[row] for row in rows], SIDE)
