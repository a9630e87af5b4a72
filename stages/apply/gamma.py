"""Chooses gamma on images: training images, without unseen classes, or a split that has masks of them."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from configs.dataset import Dataset
from configs.errors import UserError
from configs.schema import Config
from pipeline.data.dataset import IGNORE, BrokenFile, SegmentationDataset
from pipeline.gamma import SPREAD, feature_covariance, keeping_gamma
from pipeline.inference import ClassLogits, Cut
from pipeline.metrics import CalibratedStacking, best_of, seen_margins
from pipeline.student.student import Student
from stages.apply.predictor import Predictor
from stages.common.datasets import open_split
from stages.common.devices import lanes
from stages.common.progress import progress_bar, say

TrainingImage = tuple[Cut, np.ndarray]  # and its mask of seen classes, (H, W) uint8 at the cut image's size
IMAGES = 100  # of the training split, evenly spaced
STEP = 4  # of these every fourth pixel: neighbours say much the same
GAMMAS = 60  # candidates on `holdout`: quantiles of the margins on 20 images, and 0


def open_gamma_split(config: Config, data_root: Path) -> SegmentationDataset | None:
    """The split to choose gamma on; None if `evaluate.gamma` is a number or no class is unseen.

    Raises:
        UserError: the dataset has no such split, or `holdout` lacks pixels of unseen, or of seen, classes.
    """
    dataset, asked = config.dataset, config.evaluate.gamma
    if not dataset.unseen or asked not in ("auto", "holdout"):
        return None
    if asked == "auto":
        return open_split(dataset, data_root, "train")
    if "holdout" not in dataset.splits:
        raise UserError(f"evaluate.gamma=holdout: dataset {dataset.name} has no split `holdout`: use auto")
    split = open_split(dataset, data_root, "holdout")
    lacking = {"an unseen": dataset.unseen_indices, "a seen": dataset.seen_indices}
    for row in range(len(split)):
        mask = split.mask(row)
        lacking = {kind: classes for kind, classes in lacking.items() if not np.isin(mask, classes).any()}
        if not lacking:
            return split
    raise UserError(
        f"evaluate.gamma=holdout: no mask of split `holdout` of dataset {dataset.name} has a pixel of "
        f"{' or '.join(lacking)} class: use other images, auto or a number"
    )


def calibrate(
    predict: Predictor, asked: float | str, split: SegmentationDataset | None, student: Student | None = None
) -> float:
    """The gamma that `evaluate.gamma`, `asked`, calls for; NaN where there is none, which a line says.

    `auto` first sets the spread of `student`, whose predictor `predict` is (pipeline/gamma.py).

    Args:
        predict: the student's, in eval mode, or a teacher's.
        asked: auto, holdout or a number.
        split: that of `open_gamma_split`.
        student: None for a teacher, which has no spread.
    """
    if split is None:
        return 0.0 if isinstance(asked, str) else float(asked)
    if asked == "holdout":
        return gamma_of_holdout(predict, split)
    predict.before()
    images = read_training_images(predict, split)
    if student:
        student.spread.copy_(torch.from_numpy(SPREAD**2 * feature_covariance(_features(predict, student, images))))
    return gamma_of_training(predict, split, images)


def read_training_images(predict: Predictor, split: SegmentationDataset) -> list[TrainingImage]:
    """The images of `training_rows` that can be read, with their masks as in training.

    They are small: bytes, with the short side at `views.size`.
    """

    def read(row: int) -> TrainingImage | None:
        with suppress(BrokenFile):
            image, mask = split.training_pair(row)
            shown = predict.cut(image)
            return shown, np.asarray(Image.fromarray(mask).resize(shown.size[::-1], Image.Resampling.NEAREST))
        return None

    with ThreadPoolExecutor(lanes(predict.device).readers) as pool:
        return [found for found in pool.map(read, training_rows(split)) if found]


def training_rows(split: SegmentationDataset) -> list[int]:
    """Up to `IMAGES` of the split, evenly spaced."""
    return np.unique(np.linspace(0, len(split) - 1, IMAGES).astype(int)).tolist()


def _features(predict: Predictor, student: Student, images: list[TrainingImage]) -> Iterator[np.ndarray]:
    """(C, P) of R at every other position down and across, window by window."""

    def every_other(mask: np.ndarray, found: ClassLogits) -> list[np.ndarray]:
        return [window.logits[:, ::2, ::2].flatten(1).float().cpu().numpy() for window in found.windows]

    encode = replace(predict, classify=student)  # R in place of logits
    return chain.from_iterable(encode.each(images, lambda image: image, every_other))


def gamma_of_training(predict: Predictor, split: SegmentationDataset, images: list[TrainingImage]) -> float:
    """The gamma of `keeping_gamma` on up to `IMAGES` training images: cheap, a few seconds even on a CPU.

    NaN, with a warning, if no pixel is unannotated, or if no annotated pixel is classified correctly among the seen
    classes.
    """
    found = list(predict.each(images, lambda image: image, partial(_pixels, split.config)))
    margins, predicted, truth = np.concatenate(found or [np.empty((3, 0))], axis=1)
    annotated = truth != IGNORE
    gamma = None
    if not annotated.all():
        gamma = keeping_gamma(margins[annotated], predicted[annotated].astype(int), truth[annotated].astype(int))
    if gamma is None:
        lack = "unannotated pixels" if len(truth) and annotated.all() else "annotated pixels classified correctly"
        say(f"warning: no gamma: the training images looked at in {split.root} have no {lack} to choose it from")
        return math.nan
    return gamma


def _pixels(config: Dataset, mask: np.ndarray, logits: ClassLogits) -> np.ndarray:
    """(3, P) of every fourth pixel down and across: margin, best seen class, its own among the seen ones or IGNORE."""
    best_seen, names = best_of(logits, config.seen_indices, logits.size)
    margins = best_seen - best_of(logits, config.unseen_indices, logits.size)[0]
    among_seen = np.searchsorted(config.seen_indices, names.cpu().numpy())
    return np.stack([found[::STEP, ::STEP].ravel() for found in (margins.cpu().numpy(), among_seen, mask)])


def gamma_of_holdout(predict: Predictor, split: SegmentationDataset) -> float:
    """The gamma with the best hIoU on a split with masks of unseen classes, never on the reported split.

    NaN, with a warning, if hIoU is 0 at every gamma: then none of them is better than another.
    """
    seen, unseen = split.config.seen_indices, split.config.unseen_indices
    rows = range(0, len(split), max(1, len(split) // 20))

    def read(row: int) -> tuple[Cut, None]:
        return predict.cut(split.image(row)), None

    margins = np.concatenate(list(predict.each(rows, read, lambda _, logits: seen_margins(logits, seen, unseen))))
    gammas = sorted({0.0, *np.quantile(margins, np.linspace(0, 1, GAMMAS)).tolist()})
    stacking = CalibratedStacking(len(split.config.classes), seen, unseen, gammas, predict.device)
    count_pixels(predict, split, stacking, f"gamma on {split.split}", range(len(split)))
    found = [scores.hiou for scores in stacking.scores()]
    if not max(found):
        say(f"warning: no gamma: on split `{split.split}` of {split.root} hIoU is 0 whatever it is")
        return math.nan
    return gammas[int(np.argmax(found))]


def count_pixels(
    predict: Predictor, split: SegmentationDataset, stacking: CalibratedStacking, what: str, rows: Sequence[int]
) -> None:
    """Adds images of a split to `stacking`, at the masks' own size. `what` names the progress."""

    def read(row: int) -> tuple[Cut, np.ndarray]:
        image, mask = split.pair(row)
        return predict.cut(image), mask

    with progress_bar(what, len(rows), "images") as advance:
        for _ in predict.each(rows, read, stacking.update):
            advance()
