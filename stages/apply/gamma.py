"""Chooses gamma on images: training images, without unseen classes, or a split that has masks of them."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from configs.dataset import Dataset
from configs.errors import UserError
from configs.schema import Config
from pipeline.data.dataset import IGNORE, BrokenFile, SegmentationDataset
from pipeline.gamma import keeping_gamma
from pipeline.inference import ClassLogits
from pipeline.metrics import CalibratedStacking, best_of, seen_margins
from stages.common.datasets import open_split
from stages.common.progress import progress_bar, say

if TYPE_CHECKING:
    from stages.apply.evaluate import Predictor

IMAGES = 100  # of the training split, evenly spaced
STEP = 4  # of these every fourth pixel: neighbours say much the same
GAMMAS = 60  # candidates on `holdout`: quantiles of the margins on 20 images, and 0


def open_gamma_split(config: Config, data_root: Path) -> SegmentationDataset | None:
    """The split to choose gamma on; None if `evaluate.gamma` is a number or no class is unseen.

    Raises:
        UserError: the dataset has no such split, or `holdout` has no unseen pixel.
    """
    dataset, asked = config.dataset, config.evaluate.gamma
    if not dataset.unseen or asked not in ("auto", "holdout"):
        return None
    if asked == "auto":
        return open_split(dataset, data_root, "train")
    if "holdout" not in dataset.splits:
        raise UserError(f"evaluate.gamma=holdout: dataset {dataset.name} has no split `holdout`: use auto")
    split = open_split(dataset, data_root, "holdout")
    if not any(np.isin(split.mask(row), dataset.unseen_indices).any() for row in range(len(split))):
        raise UserError(
            f"evaluate.gamma=holdout: no mask of split `holdout` of dataset {dataset.name} has a pixel of an unseen "
            "class: use other images, auto or a number"
        )
    return split


def choose_gamma(predict: "Predictor", config: Config, split: SegmentationDataset | None) -> float:
    """The gamma that `evaluate.gamma` asks for; `split` is that of `open_gamma_split`."""
    asked = config.evaluate.gamma
    if split is None:
        return 0.0 if isinstance(asked, str) else float(asked)
    return gamma_of_training(predict, split) if asked == "auto" else gamma_of_holdout(predict, split)


def gamma_of_training(predict: "Predictor", split: SegmentationDataset) -> float:
    """The gamma of `keeping_gamma` on up to `IMAGES` training images: cheap, a few seconds even on a CPU.

    Masks are read as in training, without unseen classes. Unreadable images are skipped. Gamma is 0, with a warning, if
    no pixel is unannotated, or if no annotated pixel is classified correctly among the seen classes.
    """
    rows = np.unique(np.linspace(0, len(split) - 1, IMAGES).astype(int)).tolist()
    found = []
    for row in rows:
        with suppress(BrokenFile):
            image, mask = split.training_pair(row)
            found.append(_pixels(predict(image), mask, split.config))
    margins, predicted, truth = np.concatenate(found or [np.empty((3, 0))], axis=1)
    annotated = truth != IGNORE
    gamma = None
    if not annotated.all():
        gamma = keeping_gamma(margins[annotated], predicted[annotated].astype(int), truth[annotated].astype(int))
    if gamma is None:
        lack = "unannotated pixels" if len(truth) and annotated.all() else "annotated pixels classified correctly"
        say(f"warning: gamma is 0: the training images looked at in {split.root} have no {lack} to choose it from")
        return 0.0
    return gamma


def _pixels(logits: ClassLogits, mask: np.ndarray, config: Dataset) -> np.ndarray:
    """(3, P) of every fourth pixel down and across: margin, best seen class, its own among the seen ones or IGNORE."""
    best_seen, names = best_of(logits, config.seen_indices, logits.size)
    margins = best_seen - best_of(logits, config.unseen_indices, logits.size)[0]
    among_seen = np.searchsorted(config.seen_indices, names.cpu().numpy())
    small = np.asarray(Image.fromarray(mask).resize(logits.size[::-1], Image.Resampling.NEAREST))
    return np.stack([found[::STEP, ::STEP].ravel() for found in (margins.cpu().numpy(), among_seen, small)])


def gamma_of_holdout(predict: "Predictor", split: SegmentationDataset) -> float:
    """The gamma with the best hIoU on a split with masks of unseen classes, never on the reported split."""
    seen, unseen = split.config.seen_indices, split.config.unseen_indices
    rows = range(0, len(split), max(1, len(split) // 20))
    margins = np.concatenate([seen_margins(predict(split.image(row)), seen, unseen) for row in rows])
    gammas = sorted({0.0, *np.quantile(margins, np.linspace(0, 1, GAMMAS)).tolist()})
    stacking = CalibratedStacking(len(split.config.classes), seen, unseen, gammas)
    with progress_bar(f"gamma on {split.split}", len(split), "images") as advance:
        for row in range(len(split)):
            image, mask = split.pair(row)
            stacking.update(predict(image), mask)
            advance()
    return gammas[int(np.argmax([scores.hiou for scores in stacking.scores()]))]
