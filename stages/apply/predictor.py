"""Models that predict: images are read ahead in threads, and those of one size go through the model together."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from configs.schema import Config
from pipeline.inference import Classifier, ClassLogits, Cut, class_logits, short_side_to, sliding, whole
from pipeline.student.student import Student
from pipeline.teacher.teacher import Teacher, load_teacher
from stages.common.ahead import ahead
from stages.common.devices import choose_gpu, computing_threads, lanes, local_workers, processes_here
from stages.common.ranks import SHARE
from stages.common.text import class_features

_T = TypeVar("_T")
_P = TypeVar("_P")
_R = TypeVar("_R")
BATCH_PIXELS = 16 * 512**2  # of a pass on a GPU: little, as there are no gradients
CPU_PIXELS = 2**18  # of larger batches torch computes some layers another way, with other last bits
AHEAD = 4  # images for each thread that reads


@dataclass(frozen=True)
class Predictor:
    """A model, and how it is shown images.

    Attributes:
        classify: on normalised pixels on `device`.
        stride, mean, std: the model's.
        config: `views.size` and `evaluate.mode` say how images are cut into windows.
        device: where it computes.
        class_of_channel: the class of each logit, ascending.
        lanes: how many batches may be computed at the same time.
        before: called before the results of a batch are handed on; may raise.
    """

    classify: Classifier
    stride: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    config: Config
    device: str
    class_of_channel: Sequence[int]
    lanes: int = 1
    before: Callable[[], object] = lambda: None

    def cut(self, image: np.ndarray) -> Cut:
        """(H, W, 3) uint8 with its short side at `views.size`, in windows."""
        resized = short_side_to(image, self.config.views.size)
        height, width = resized.shape[:2]
        how = self.config.evaluate
        if how.mode == "whole":
            return Cut(resized, whole(height, width))
        return Cut(resized, sliding(height, width, self.config.views.size, how.stride))

    def logits(self, cuts: Sequence[Cut]) -> list[ClassLogits]:
        """The class logits of images whose windows have one size."""
        at_once = self._at_once(cuts[0])
        return class_logits(
            cuts, self.classify, self.stride, self.mean, self.std, self.device, at_once, self.class_of_channel
        )

    def __call__(self, image: np.ndarray) -> ClassLogits:
        return self.logits([self.cut(image)])[0]

    def each(
        self,
        items: Iterable[_T],
        ready: Callable[[_T], tuple[Cut, _P] | None],
        finish: Callable[[_P, ClassLogits], _R],
    ) -> Iterator[_R]:
        """`finish` of each item's class logits and what `ready` gives beside its cut image; None leaves the item out.

        Images are read in threads, where `ready` runs, and go through the model in batches of windows of one size; so
        they are not in the items' order, but in one that the images' sizes alone decide. `finish` runs in `lanes`
        threads, as does the model.
        """
        readers = lanes(self.device).readers

        def compute(found: list[tuple[Cut, _P]]) -> list[_R]:
            logits = self.logits([image for image, _ in found])
            return [finish(beside, own) for (_, beside), own in zip(found, logits, strict=True)]

        with (
            computing_threads(lanes("cpu").threads) if self.lanes > 1 else nullcontext(),
            ThreadPoolExecutor(readers) as reading,
            ThreadPoolExecutor(self.lanes, initializer=partial(choose_gpu, self.device)) as computing,
        ):
            groups = self._in_groups(ahead(reading, ready, items, AHEAD * readers))
            for results in ahead(computing, compute, groups, 2 * self.lanes):
                self.before()
                yield from results

    def _in_groups(self, images: Iterable[tuple[Cut, _P] | None]) -> Iterator[list[tuple[Cut, _P]]]:
        """Groups of images with windows of one size, as many as go through the model at once.

        All of a group come from one share: a batch's other images change the last bits of an image's logits, so they
        must not depend on how many ranks there are.
        """
        images = iter(images)
        while share := list(islice(images, SHARE)):
            by_size: dict[tuple[int, int], list[tuple[Cut, _P]]] = defaultdict(list)
            for found in share:
                if found:
                    by_size[found[0].window].append(found)
            for group in by_size.values():
                most = max(1, self._at_once(group[0][0]) // len(group[0][0].boxes))
                parts = -(-len(group) // most)  # of nearly one size: a pass of a single image is the slowest
                yield from (group[part::parts] for part in range(parts))

    def _at_once(self, image: Cut) -> int:
        """How many of its windows a pass takes."""
        height, width = image.window
        return max(1, (BATCH_PIXELS if self.device != "cpu" else CPU_PIXELS) // (height * width))


def student_predictor(
    student: Student, text_features: Tensor, config: Config, class_of_channel: Sequence[int] | None = None
) -> Predictor:
    """The student alone, in eval mode; `text_features` (K, C), and the class of each, are those of `config.dataset`."""

    def classify(pixels: Tensor) -> Tensor:
        return student.classify(pixels, text_features)

    device = str(text_features.device)
    # Small layers gain little from many cores, so on a CPU each group of cores has its own images, as in stage one.
    at_once = max(1, local_workers("cpu") // processes_here()) if device == "cpu" else 1
    classes = config.dataset.class_of_channel if class_of_channel is None else class_of_channel
    return Predictor(classify, student.stride, student.mean, student.std, config, device, classes, at_once)


def teacher_predictor(config: Config, device: str) -> Predictor:
    """The teacher's zero-shot dense prediction over the classes of `config.dataset`."""
    teacher = load_teacher(config.teacher, device)
    return dense_predictor(teacher, torch.from_numpy(class_features(config, lambda: teacher)).to(device), config)


def dense_predictor(
    teacher: Teacher, text_features: Tensor, config: Config, class_of_channel: Sequence[int] | None = None
) -> Predictor:
    """Cosine of the teacher's dense tokens and `text_features` (K, C)."""

    def classify(pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        _, dense = teacher.encode(nn.functional.pad(pixels, (0, -width % teacher.stride, 0, -height % teacher.stride)))
        return torch.einsum("bhwc,kc->bkhw", nn.functional.normalize(dense, dim=-1), text_features)

    classes = config.dataset.class_of_channel if class_of_channel is None else class_of_channel
    return Predictor(classify, teacher.stride, teacher.mean, teacher.std, config, str(text_features.device), classes)
