"""Generalized zero-shot metrics: one prediction over all classes, IoU averaged separately over seen and unseen."""

import math
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.dataset import IGNORE, ignore_index
from pipeline.inference import ClassLogits

CHUNK_VALUES = 2**20  # logits that a CPU holds at full size at once: 4 MB
PIXELS = 2**20  # counted at once: in 64 bits, all of a large image would take much memory
FEWEST = 4  # channels upsampled at once: for fewer torch takes another kernel, whose last bit differs


def confusion_matrix(truth: Tensor, prediction: Tensor, classes: int) -> Tensor:
    """(K, K) int64 counts of pixels, rows truth, columns prediction; pixels without a class in `truth` are skipped.

    Args:
        truth: as masks are, uint8 or uint16, of any shape.
        prediction: integers from 0 of that shape, on the same device.
    """
    counts = torch.zeros(classes * classes + 1, dtype=torch.int64, device=truth.device)
    for true, predicted in zip(truth.flatten().split(PIXELS), prediction.flatten().split(PIXELS), strict=True):
        rows = true.long()
        pairs = torch.where(rows == ignore_index(classes), classes * classes, rows * classes + predicted)
        counts += torch.bincount(pairs, minlength=classes * classes + 1)
    return counts[:-1].view(classes, classes)


@dataclass(frozen=True)
class Scores:
    """Percentages; NaN means no value.

    `iou` is per class, NaN for a class in neither truth nor prediction; means skip these. A mean is NaN if no pixel is
    of one of its classes, and hIoU is NaN if either of its means is.
    """

    pixel_accuracy: float
    miou: float
    miou_seen: float
    miou_unseen: float
    hiou: float
    iou: list[float]


def harmonic_mean(seen: float, unseen: float) -> float:
    """Eq. 9; 0 when both are 0."""
    return 2 * seen * unseen / (seen + unseen) if seen + unseen else 0.0


def scores(confusion: np.ndarray, seen: list[int], unseen: list[int]) -> Scores:
    """All metrics of a confusion matrix. `seen`, `unseen`: class indices."""
    correct = confusion.diagonal().astype(float)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - correct
    iou = 100 * np.divide(correct, union, out=np.full(len(union), np.nan), where=union > 0)

    def mean(classes: list[int]) -> float:
        known = iou[classes][~np.isnan(iou[classes])]
        return float(known.mean()) if confusion[classes].any() else float("nan")

    miou_seen, miou_unseen, miou = mean(seen), mean(unseen), mean(list(range(len(iou))))
    accuracy = 100 * correct.sum() / confusion.sum() if confusion.any() else np.nan
    return Scores(float(accuracy), miou, miou_seen, miou_unseen, harmonic_mean(miou_seen, miou_unseen), iou.tolist())


def _resize(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(k, h, w) at `size`."""
    if logits.shape[1:] == size:
        return logits
    return nn.functional.interpolate(logits[None], size=size, mode="bilinear")[0]


def best_of(logits: ClassLogits, classes: list[int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The best of `classes` at each pixel: logit (H, W) and class index (H, W); ties go to the smallest index.

    A class with several channels counts by the best of them.

    The logits are upsampled to `size` (bilinear, align_corners=False) some channels at a time: all of them at the size
    of a large image would fill the memory. Bit for bit what the maximum over all at once gives (on a CPU of images of
    more than 128 pixels in height and width together; of smaller ones torch's last bit depends on the classes' order).
    """
    height, width = logits.size
    device = logits.windows[0].logits.device
    step = max(FEWEST, _chunk_values(device) // max(size[0] * size[1], height * width))
    best = torch.full(size, -torch.inf, device=device)
    which = torch.full(size, classes[0], dtype=torch.int32, device=device)
    raise_to = _raise_one_by_one if device.type == "cpu" else _raise_at_once
    channels = logits.channels_of(classes)
    for start in range(0, len(channels), step):
        chunk = channels[start : start + step]
        chunk += chunk[-1:] * (FEWEST - len(chunk))
        upsampled = logits.upsampled([channel for channel, _ in chunk])
        raise_to(best, which, _resize(upsampled, size), [index for _, index in chunk])
    return best, which


def _chunk_values(device: torch.device) -> int:
    """How many logits are held at full size at once: what a CPU's caches hold, or an eighth of a GPU's free memory."""
    if device.type != "cuda":
        return CHUNK_VALUES
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min((torch.cuda.mem_get_info(device)[0] + unused) // (8 * 4), 2**30)


def _raise_one_by_one(best: Tensor, which: Tensor, upsampled: Tensor, names: list[int]) -> None:
    """Where a class of `upsampled` (k, H, W) is above `best`, it takes its place. For a CPU."""
    higher = torch.empty(best.shape, dtype=torch.bool)
    for logit, name in zip(upsampled, names, strict=True):
        which.masked_fill_(torch.gt(logit, best, out=higher), name)
        torch.maximum(best, logit, out=best)


def _raise_at_once(best: Tensor, which: Tensor, upsampled: Tensor, names: list[int]) -> None:
    """The same in few operations, for a GPU."""
    highest, place = upsampled.max(dim=0)  # the first of equals
    higher = highest > best
    which[:] = torch.where(higher, torch.tensor(names, dtype=torch.int32, device=which.device)[place], which)
    torch.maximum(best, highest, out=best)


def calibrated_argmax(
    logits: ClassLogits, size: tuple[int, int], seen: list[int], unseen: list[int], gammas: list[float]
) -> list[Tensor]:
    """Predictions (H, W) at `size`, one for each gamma, of which NaN is none; ties go to the smallest class index.

    `seen` and `unseen` hold class indices in ascending order.

    Calibrated stacking subtracts gamma from the seen classes' logits; only the best seen and the best unseen class of a
    pixel can win, whatever gamma is.
    """
    best_seen, name_seen = best_of(logits, seen, size)
    if not unseen:
        return [name_seen] * len(gammas)
    best_unseen, name_unseen = best_of(logits, unseen, size)
    predictions = []
    for gamma in gammas:
        lowered = best_seen if math.isnan(gamma) else best_seen - gamma
        seen_wins = (lowered > best_unseen) | ((lowered == best_unseen) & (name_seen < name_unseen))
        predictions.append(torch.where(seen_wins, name_seen, name_unseen))
    return predictions


def predicted_mask(
    logits: ClassLogits, size: tuple[int, int], seen: list[int], unseen: list[int], gamma: float
) -> np.ndarray:
    """The prediction (H, W) uint8 of at most 255 classes, see `calibrated_argmax`."""
    return calibrated_argmax(logits, size, seen, unseen, [gamma])[0].byte().cpu().numpy()


class CalibratedStacking:
    """Confusion matrices under every gamma at once, in one pass over the images.

    Attributes:
        confusions: (gammas, K, K) int64, on the device of the logits.
    """

    def __init__(
        self, classes: int, seen: list[int], unseen: list[int], gammas: list[float], device: str = "cpu"
    ) -> None:
        self.classes, self.seen, self.unseen, self.gammas = classes, seen, unseen, gammas
        self.confusions = torch.zeros(len(gammas), classes, classes, dtype=torch.int64, device=device)
        self._lock = Lock()

    def update(self, truth: np.ndarray, logits: ClassLogits) -> None:
        """Adds one image, whose logits are upsampled to the size of the truth (H, W). Threads may do so together."""
        height, width = truth.shape
        predictions = calibrated_argmax(logits, (height, width), self.seen, self.unseen, self.gammas)
        there = torch.tensor(truth, device=self.confusions.device)
        counts = torch.stack([confusion_matrix(there, prediction, self.classes) for prediction in predictions])
        with self._lock:
            self.confusions += counts

    def scores(self) -> list[Scores]:
        """The scores under each gamma, in order."""
        return [scores(confusion, self.seen, self.unseen) for confusion in self.confusions.cpu().numpy()]


def seen_margins(logits: ClassLogits, seen: list[int], unseen: list[int]) -> np.ndarray:
    """(H * W,) best seen minus best unseen logit of each pixel: the gamma at which its prediction becomes unseen."""
    margin = best_of(logits, seen, logits.size)[0] - best_of(logits, unseen, logits.size)[0]
    return margin.flatten().cpu().numpy()


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
