"""What subtracting each word's spread does, over its weight and over the share of accuracy that gamma keeps.

    python benchmarks/spread.py NAME=RUN=DIR...    # DIR: where the run's dataset is

Of each run, every fourth pixel of the test split. Gamma is chosen on training images, as `evaluate.gamma=auto` does;
"best" is the gamma that is best on the test split itself, which nobody can know.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.dataset import IGNORE, SegmentationDataset
from pipeline.gamma import SPREAD, keeping_gamma
from pipeline.metrics import scores
from stages.apply.gamma import STEP, training_rows
from stages.apply.predictor import Predictor, student_predictor
from stages.common.runs import load_run

WEIGHTS, KEPT, GAMMAS = (0, 0.35, 0.7, 1, 1.4), (0.95, 0.97), np.linspace(-1.5, 2.5, 81)
Pixels = tuple[np.ndarray, np.ndarray]  # logits (K, P) float32, labels (P,)


def pixels(predict: Predictor, image: np.ndarray, mask: np.ndarray, classes: int) -> Pixels:
    logits = predict(image)
    small = np.asarray(Image.fromarray(mask).resize(logits.size[::-1], Image.Resampling.NEAREST))[::STEP, ::STEP]
    found = logits.upsampled(list(range(classes)))[:, ::STEP, ::STEP].numpy()
    known = small != IGNORE
    return found[:, known], small[known]


class Sides:
    """Best seen and best unseen class of every pixel."""

    def __init__(self, found: Pixels, seen: list[int], unseen: list[int]) -> None:
        logits, self.labels = found
        self.seen, self.unseen, self.classes = seen, unseen, len(logits)
        self.best_seen = np.array(seen)[logits[seen].argmax(axis=0)]
        self.best_unseen = np.array(unseen)[logits[unseen].argmax(axis=0)]
        self.margins = logits[seen].max(axis=0) - logits[unseen].max(axis=0)

    def hiou(self, gamma: float) -> float:
        predicted = np.where(self.margins >= gamma, self.best_seen, self.best_unseen)
        confusion = np.bincount(self.labels.astype(int) * self.classes + predicted, minlength=self.classes**2)
        return scores(confusion.reshape(self.classes, self.classes), self.seen, self.unseen).hiou

    def gamma(self, keep: float) -> float:
        annotated = np.isin(self.labels, self.seen)
        parts = (part[annotated] for part in (self.margins, self.best_seen, self.labels.astype(int)))
        gamma = keeping_gamma(*parts, keep)
        assert gamma is not None
        return gamma


def measure(run_path: Path, data_root: Path) -> list[str]:
    run = load_run(run_path)
    config = run.config.dataset
    seen, unseen, count = config.seen_indices, config.unseen_indices, len(config.classes)
    text = run.text_features.numpy()
    spread = np.sqrt(((text @ run.student.spread.numpy()) * text).sum(1))[:, None] / SPREAD
    run.student.spread.zero_()
    predict, test = student_predictor(run.student, run.text_features, run.config), run.config.evaluate.split
    split = SegmentationDataset(config, data_root, "train")
    trained = [  # whose labels count the seen classes alone
        (logits, np.array(seen)[labels])
        for logits, labels in (pixels(predict, *split.training_pair(row), count) for row in training_rows(split))
    ]
    split = SegmentationDataset(config, data_root, test)
    tested = [pixels(predict, *split.pair(row), count) for row in range(len(split))]
    own, other = (
        (np.concatenate([logits for logits, _ in part], axis=1), np.concatenate([labels for _, labels in part]))
        for part in (trained, tested)
    )
    cells = []
    for weight in WEIGHTS:
        of_train, of_test = (Sides((logits - weight * spread, labels), seen, unseen) for logits, labels in (own, other))
        shown = [of_test.hiou(gamma) for gamma in (0, *map(of_train.gamma, KEPT))]
        shown.append(max(map(of_test.hiou, GAMMAS)))
        cells.append(", ".join(f"{value:.1f}" for value in shown))
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN=DIR")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "spread.md")
    asked = parser.parse_args()
    columns = " | ".join(f"{weight:g} deviations" for weight in WEIGHTS)
    lines = [
        "# The spread of words, subtracted",
        "",
        "`python benchmarks/spread.py NAME=RUN=DIR...`. hIoU in %, at every fourth pixel: at gamma 0; at the gammas "
        f"that keep {' and '.join(f'{kept:.0%}' for kept in KEPT)} of the seen classes' mean accuracy on training "
        "images; at the gamma that is best on the test split itself, which nobody can know.",
        "",
        f"| run | {columns} |",
        "|---" * (1 + len(WEIGHTS)) + "|",
    ]
    for run in asked.runs:
        name, path, data_root = run.split("=")
        lines.append(" | ".join([f"| {name}", *measure(Path(path), Path(data_root))]) + " |")
        print(lines[-1], flush=True)
    asked.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
