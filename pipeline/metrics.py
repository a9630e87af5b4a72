"""Generalized zero-shot metrics: one prediction over all classes, IoU averaged over seen and unseen apart."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORE = 255


def confusion_matrix(truth: np.ndarray, prediction: np.ndarray, classes: int) -> np.ndarray:
    """(K, K) int64 counts of pixels, rows truth, columns prediction; IGNORE in `truth` is left out."""
    valid = truth != IGNORE
    pairs = truth[valid].astype(np.int64) * classes + prediction[valid]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


@dataclass(frozen=True)
class Scores:
    """Percentages. `iou` is per class, NaN for a class in neither truth nor prediction, which no mean counts."""

    pixel_accuracy: float
    miou_seen: float
    miou_unseen: float
    hiou: float
    iou: list[float]


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else 0.0


def harmonic_mean(seen: float, unseen: float) -> float:
    """Eq. 9; 0 when both are 0."""
    return 2 * seen * unseen / (seen + unseen) if seen + unseen else 0.0


def scores(confusion: np.ndarray, seen: list[int], unseen: list[int]) -> Scores:
    """All metrics of a confusion matrix. `seen`, `unseen`: class indices."""
    correct = confusion.diagonal().astype(float)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - correct
    iou = 100 * np.divide(correct, union, out=np.full(len(union), np.nan), where=union > 0)
    miou_seen, miou_unseen = _mean(iou[seen]), _mean(iou[unseen])
    accuracy = 100 * correct.sum() / max(confusion.sum(), 1)
    return Scores(float(accuracy), miou_seen, miou_unseen, harmonic_mean(miou_seen, miou_unseen), iou.tolist())


def calibrated_argmax(logits: Tensor, seen: list[int], unseen: list[int], gammas: list[float]) -> list[np.ndarray]:
    """Predictions (H, W) of (K, H, W) logits, one for each gamma; ties go to the smallest class index.

    `seen` and `unseen` hold class indices in ascending order.

    Calibrated stacking subtracts gamma from the seen classes' logits; only the best seen and the best unseen class of a
    pixel can win, whatever gamma is.
    """
    best_seen, which_seen = logits[seen].max(dim=0)
    name_seen = torch.tensor(seen, device=logits.device)[which_seen]
    if not unseen:
        return [name_seen.cpu().numpy()] * len(gammas)
    best_unseen, which_unseen = logits[unseen].max(dim=0)
    name_unseen = torch.tensor(unseen, device=logits.device)[which_unseen]
    predictions = []
    for gamma in gammas:
        lowered = best_seen - gamma
        seen_wins = (lowered > best_unseen) | ((lowered == best_unseen) & (name_seen < name_unseen))
        predictions.append(torch.where(seen_wins, name_seen, name_unseen).cpu().numpy())
    return predictions


class CalibratedStacking:
    """Confusion matrices under every gamma at once, in one pass over the images."""

    def __init__(self, classes: int, seen: list[int], unseen: list[int], gammas: list[float]) -> None:
        self.classes, self.seen, self.unseen, self.gammas = classes, seen, unseen, gammas
        self.confusions = np.zeros((len(gammas), classes, classes), np.int64)

    def update(self, logits: Tensor, truth: np.ndarray) -> None:
        """Adds one image: (K, H, W) logits and (H, W) truth."""
        for row, prediction in enumerate(calibrated_argmax(logits, self.seen, self.unseen, self.gammas)):
            self.confusions[row] += confusion_matrix(truth, prediction, self.classes)

    def scores(self) -> list[Scores]:
        """The scores under each gamma, in order."""
        return [scores(confusion, self.seen, self.unseen) for confusion in self.confusions]


def seen_margins(logits: Tensor, seen: list[int], unseen: list[int]) -> np.ndarray:
    """(H * W,) best seen minus best unseen logit of each pixel of (K, H, W): the gammas at which it changes sides."""
    return (logits[seen].amax(dim=0) - logits[unseen].amax(dim=0)).flatten().cpu().numpy()


def purity(groups: np.ndarray, truth: np.ndarray) -> float:
    """Share of tokens that belong to their group's majority class; NaN when no token counts.

    Args:
        groups: (G, G) uint8 pseudo labels; 255 tokens do not count.
        truth: (G, G) true class of each token; IGNORE tokens do not count.
    """
    counted = (groups != IGNORE) & (truth != IGNORE)
    if not counted.any():
        return float("nan")
    table = np.zeros((256, 256), np.int64)
    np.add.at(table, (groups[counted], truth[counted]), 1)
    return float(table.max(axis=1).sum() / counted.sum())
