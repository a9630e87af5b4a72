"""What stage two reads: stored views replayed on images and seen masks, beside what the cache holds for them."""

from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import v2

from pipeline.data.dataset import SegmentationDataset
from pipeline.data.views import normalise, replay


class Sample(TypedDict):
    """One training view; the default collation stacks them into a batch."""

    pixels: Tensor  # (3, S, S) float32, the student's normalisation
    seen: Tensor  # (S, S) uint8 seen classes, 255 = unannotated
    row: int  # which image of the split, hence of the cache
    view: int  # which of its views


class TrainingViews(TorchDataset[Sample]):
    """The whole run's samples in order: sample d depends on nothing but the seed and d.

    Every epoch is a permutation of all views. Photometric distortion (brightness by a factor of 1 +- 32 / 255,
    contrast and saturation 0.5-1.5, hue 18 degrees, each half the time) is drawn anew each time; the teacher never
    sees it.
    """

    def __init__(
        self, dataset: SegmentationDataset, views: np.ndarray, size: int, samples: int, seed: int,
        mean: tuple[float, ...], std: tuple[float, ...],
    ) -> None:  # fmt: skip
        """`views`: (N, V, 5) as recorded by stage one; `samples`: iterations x batch size."""
        self.dataset, self.views, self.size = dataset, views, size
        self.samples, self.seed, self.mean, self.std = samples, seed, mean, std
        distortions = {"brightness": 32 / 255, "contrast": 0.5, "saturation": 0.5, "hue": 18 / 360}
        self._distort = v2.Compose(
            [v2.RandomApply([v2.ColorJitter(**{name: strength})], p=0.5) for name, strength in distortions.items()]
        )
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, draw: int) -> Sample:
        count = self.views.shape[0] * self.views.shape[1]
        epoch, place = divmod(draw, count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(count)
        row, view = divmod(int(self._order[place]), self.views.shape[1])
        image, seen = self.dataset.training_pair(row)
        geometry = self.views[row, view]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + draw)
            shown = torch.from_numpy(replay(geometry, image, self.size).copy()).permute(2, 0, 1)
            distorted = self._distort(shown).permute(1, 2, 0).numpy()
        return {
            "pixels": normalise(distorted[None], self.mean, self.std)[0],
            "seen": torch.from_numpy(replay(geometry, seen, self.size).copy()),
            "row": row,
            "view": view,
        }
