"""Validation in the course of a training: scores at gamma 0, and pictures of the same few images each time."""

from collections.abc import Callable

import numpy as np
from PIL import Image
from torch import Tensor

from configs.schema import Config
from pipeline.data.dataset import SegmentationDataset
from pipeline.inference import ClassLogits
from pipeline.student.student import Student
from stages.evaluate import evaluate_predictor, student_predictor
from stages.progress import say
from stages.training.log import RunLog, read_scores
from stages.training.pictures import few, predictions
from stages.training.stopping import Stop


class Validation:
    """Scores a student on one split; which of a run's validations are done, and which was the best, its log knows."""

    def __init__(
        self, config: Config, dataset: SegmentationDataset, text_features: Tensor, log: RunLog, stop: Stop,
        show_attention: Callable[[Student], Image.Image],
    ) -> None:  # fmt: skip
        self.config, self.dataset, self.text_features, self.log, self.stop = config, dataset, text_features, log, stop
        self.show_attention = show_attention
        generalised = bool(config.dataset.unseen)
        self.names = ("miou", "miou_seen", "miou_unseen", "hiou") if generalised else ("miou",)
        self._scores = {line["iteration"]: line[self.names[-1]] for line in read_scores(log.path)}

    def __call__(self, student: Student, iteration: int) -> None:
        """Leaves `student` in eval mode.

        Raises:
            Stopped: a signal came between two images.
        """
        predict = student_predictor(student.eval(), self.text_features, self.config)

        def until_stopped(image: np.ndarray) -> ClassLogits:
            self.stop.check()
            return predict(image)

        scores = evaluate_predictor(until_stopped, self.dataset, [0.0])[0]
        shown = {row: predict(self.dataset.image(row)) for row in few(range(len(self.dataset)))}
        self.log.picture(iteration, f"{self.dataset.split}/predictions", predictions(self.dataset, shown))
        self.log.picture(iteration, "train/attention", self.show_attention(student))
        self.log.scores(iteration, self.dataset.split, scores, self.names)
        self._scores[iteration] = getattr(scores, self.names[-1])
        values = ", ".join(f"{name} {getattr(scores, name):.1f}" for name in self.names)
        say(f"iteration {iteration}, {self.dataset.split}, gamma 0: {values}")

    def done(self, iteration: int) -> bool:
        return iteration in self._scores

    @property
    def best(self) -> int | None:
        """The iteration of the highest hIoU (mIoU, where no class is unseen); the first of equals."""
        return max(self._scores, key=self._scores.__getitem__, default=None)
