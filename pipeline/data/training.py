"""What stage two reads: stored views replayed on images and seen masks, beside what the cache holds for them."""

from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import v2

from pipeline.data.dataset import SegmentationDataset
from pipeline.data.views import inside, normalise, padding_colour, replay


class Sample(TypedDict):
    """One training view; the default collation stacks them into a batch."""

    pixels: Tensor  # (3, S, S) float32, the student's normalisation
    seen: Tensor  # (S, S) uint8 seen classes, 255 = unannotated
    row: int  # which image of the split, hence of the cache
    view: int  # which of its views


def distort(image: Tensor) -> Tensor:
    """Photometric distortion of (3, H, W) uint8 after mmsegmentation's: each part half the time, by torch's generator.

    Brightness +-32, contrast x 0.5-1.5 (before or after the next two), saturation x 0.5-1.5, hue +-18 of OpenCV's 180.
    Saturation is torchvision's, a blend with grey, where mmsegmentation scales the S of HSV.
    """
    if torch.rand(()) < 0.5:
        image = (image + torch.empty(()).uniform_(-32, 32)).clamp(0, 255).to(torch.uint8)
    parts = [_saturation, _hue]
    parts.insert(2 * int(torch.randint(2, ())), _contrast)
    for part in parts:
        image = part(image)
    return image


# torchvision's "brightness" multiplies pixels, which is what mmsegmentation calls contrast.
_contrast, _saturation, _hue = (
    v2.RandomApply([v2.ColorJitter(**jitter)], p=0.5)
    for jitter in ({"brightness": 0.5}, {"saturation": 0.5}, {"hue": 0.1})
)


class TrainingViews(TorchDataset[Sample]):
    """The whole run's samples in order: sample d depends on nothing but the seed and d.

    Every epoch is a permutation of all views of `rows`. Photometric distortion is drawn anew each time; the teacher
    never sees it.
    """

    def __init__(
        self, dataset: SegmentationDataset, rows: np.ndarray, views: np.ndarray, size: int, samples: int, seed: int,
        mean: tuple[float, ...], std: tuple[float, ...],
    ) -> None:  # fmt: skip
        """`rows`: images to train on; `views`: (N, V, 5) of stage one; `samples`: iterations x batch size."""
        self.dataset, self.rows, self.views, self.size = dataset, rows, views, size
        self.samples, self.seed, self.mean, self.std = samples, seed, mean, std
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, draw: int) -> Sample:
        views_each = self.views.shape[1]
        count = len(self.rows) * views_each
        epoch, place = divmod(draw, count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(count)
        kept, view = divmod(int(self._order[place]), views_each)
        row = int(self.rows[kept])
        image, seen = self.dataset.training_pair(row)
        geometry = self.views[row, view]
        padding = padding_colour(self.mean)
        shown = replay(geometry, image, self.size, padding)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed((self.seed * 1_000_003 + draw) % 2**63)
            distorted = distort(torch.from_numpy(shown).permute(2, 0, 1)).permute(1, 2, 0).numpy()
        distorted[~inside(geometry, self.size)] = padding
        return {
            "pixels": normalise(distorted[None], self.mean, self.std)[0],
            "seen": torch.from_numpy(replay(geometry, seen, self.size)),
            "row": row,
            "view": view,
        }
