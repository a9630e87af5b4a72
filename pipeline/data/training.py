"""The samples of stage two's loader: stored views replayed on images and seen masks, optionally with region tokens."""

from collections.abc import Callable
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np
from torch.utils.data import Dataset as TorchDataset

from configs.schema import Views
from pipeline.data.dataset import SegmentationDataset
from pipeline.data.distortion import distort, draw_distortion
from pipeline.data.views import draw_views, inside, padding_colour, replay, teacher_view


class Sample(TypedDict):
    """One training view; the default collation stacks them into a batch of tensors.

    Pixels are sent as bytes, a quarter of the size of the floats they become on the device.
    """

    pixels: np.ndarray  # (S, S, 3) uint8
    seen: np.ndarray  # (S, S) uint8 seen classes, 255 = unannotated
    row: int  # which image of the split, hence of the cache
    view: int  # which of its views
    shown: NotRequired[np.ndarray]  # (S, S, 3) uint8, what a live teacher sees: undistorted, its own padding
    unannotated: NotRequired[np.ndarray]  # (G, G) bool, of a live teacher's tokens
    region_tokens: NotRequired[np.ndarray]  # (M, C) int8, where they are asked for


class LiveView(NamedTuple):
    """The input for a live teacher. `fresh`: draw new views with these settings instead of the recorded ones."""

    mean: tuple[float, ...]
    grid: int
    fresh: Views | None = None


class TrainingViews(TorchDataset[Sample]):
    """The whole run's samples in order: sample d depends on nothing but the seed and d.

    Every epoch is a permutation of all views of `rows`. Photometric distortion is drawn anew each time; the teacher
    never sees it.
    """

    def __init__(
        self, dataset: SegmentationDataset, rows: np.ndarray, views: np.ndarray, size: int, samples: int, seed: int,
        mean: tuple[float, ...], live: LiveView | None = None,
        region_tokens: Callable[[int, int], np.ndarray] | None = None,
    ) -> None:  # fmt: skip
        """`rows`: images to train on; `views`: (N, V, 5) of stage one; `samples`: iterations x batch size.

        `mean` is the student's, for the colour of padding. `region_tokens` gives those of a row and a view, (M, C)
        int8; loader workers get a copy of it.
        """
        self.dataset, self.rows, self.views, self.size = dataset, rows, views, size
        self.samples, self.seed, self.padding, self.live = samples, seed, padding_colour(mean), live
        self.region_tokens = region_tokens
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
        if self.live and self.live.fresh:  # in the first epoch, those recorded
            geometry = draw_views(self.live.fresh, self.dataset.ids[row], seen, [epoch * views_each + view])[0]
        how = draw_distortion(np.random.default_rng([self.seed, draw, 1]))  # 1: not the numbers of an epoch's order
        pixels = distort(replay(geometry, image, self.size, self.padding), how)
        shown = inside(geometry, self.size)
        if not shown.all():
            pixels[~shown] = self.padding
        sample: Sample = {
            "pixels": pixels, "seen": replay(geometry, seen, self.size), "row": row, "view": view,
        }  # fmt: skip
        if self.live:
            padding = padding_colour(self.live.mean)
            sample["shown"], sample["unannotated"] = teacher_view(
                geometry, image, seen, self.size, padding, self.live.grid
            )
        if self.region_tokens:
            sample["region_tokens"] = self.region_tokens(row, view)
        return sample
