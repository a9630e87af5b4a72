"""Validation during training: chooses gamma, scores at it, and draws pictures of the same few images."""

import math
from collections.abc import Callable
from dataclasses import replace

from PIL import Image
from torch import Tensor

from configs.schema import Config
from pipeline.data.dataset import SegmentationDataset
from pipeline.student.student import Student
from stages.apply.evaluate import evaluate_predictor
from stages.apply.gamma import calibrate
from stages.apply.predictor import Predictor, student_predictor
from stages.common.progress import figure, say
from stages.train.log import RunLog, read_scores
from stages.train.pictures import few, predictions
from stages.train.stopping import Stop


class Validation:
    """Scores a student on one split. The run's log records which validations are done and which was best."""

    def __init__(
        self, config: Config, dataset: SegmentationDataset, gamma_split: SegmentationDataset | None,
        text_features: Tensor, log: RunLog | None, stop: Stop, show_attention: Callable[[Student], Image.Image],
    ) -> None:  # fmt: skip
        """`gamma_split` is that of `open_gamma_split`; `log` is None on all ranks but the first."""
        self.config, self.dataset, self.text_features, self.log, self.stop = config, dataset, text_features, log, stop
        self.gamma_split, self.show_attention = gamma_split, show_attention
        generalised = bool(config.dataset.unseen)
        self.names = ("miou", "miou_seen", "miou_unseen", "hiou") if generalised else ("miou",)
        self._scores: dict[int, float | None] = {
            line["iteration"]: line[self.names[-1]] for line in (read_scores(log.path) if log else ())
        }

    def choose_gamma(self, student: Student) -> float:
        """The gamma that `evaluate.gamma` asks for; `auto` uses a few training images and takes seconds.

        Leaves `student` in eval mode.

        Raises:
            Stopped: a signal came between two images.
        """
        return calibrate(self._predictor(student), self.config.evaluate.gamma, self.gamma_split, student)

    def __call__(self, student: Student, iteration: int, gamma: float) -> None:
        """Scores at `gamma`, which select the best validation, and at 0. Leaves `student` in eval mode.

        Every rank takes its share of the images.

        Raises:
            Stopped: a signal came between two images.
            OtherRankFailed: or it came to another rank.
        """
        predict = self._predictor(student)
        scores, plain = evaluate_predictor(predict, self.dataset, [gamma, 0.0])
        if self.log is None:
            return
        logits = {row: predict(self.dataset.image(row)) for row in few(range(len(self.dataset)))}
        self.log.picture(iteration, f"{self.dataset.split}/predictions", predictions(self.dataset, logits, gamma))
        self.log.picture(iteration, "train/attention", self.show_attention(student))
        shown = {name: getattr(scores, name) for name in self.names}
        main = self.names[-1]
        own = {"gamma": gamma, f"{main}_at_0": getattr(plain, main)} if self.config.dataset.unseen else {}
        self.log.scores(iteration, self.dataset.split, {**shown, **own})
        self._scores[iteration] = shown[main]
        values = ", ".join(f"{name} {figure(value)}" for name, value in shown.items())
        at = f", gamma {figure(gamma, '.3g')}" if own else ""
        say(f"iteration {iteration}, {self.dataset.split}{at}: {values}")

    def _predictor(self, student: Student) -> Predictor:
        return replace(student_predictor(student.eval(), self.text_features, self.config), before=self.stop.check)

    def done(self, iteration: int) -> bool:
        return iteration in self._scores

    @property
    def best(self) -> int | None:
        """The iteration with the highest hIoU (or mIoU, if no class is unseen), if any; the first in case of a tie."""
        known = {at: score for at, score in self._scores.items() if score is not None and not math.isnan(score)}
        return max(known, key=known.__getitem__, default=None)
