"""What subtracting each word's spread does, over its weight and over the share of accuracy that gamma keeps.

    python benchmarks/spread.py NAME=RUN=DIR...    # DIR: where the run's dataset is

Of each run, every fourth pixel of the test split. Gamma is chosen on training images, as `evaluate.gamma=auto` does;
"best" is the gamma that is best on the test split itself, which nobody can know.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline import gamma as calibration
from pipeline.data.dataset import IGNORE, SegmentationDataset
from pipeline.gamma import keeping_gamma
from pipeline.metrics import scores
from stages.apply.evaluate import Predictor, student_predictor
from stages.apply.gamma import STEP, gamma_pairs
from stages.common.runs import load_run

WEIGHTS, KEPT, GAMMAS = (0, 0.35, 0.7, 1, 1.4), (0.95, 0.97), np.linspace(-1.5, 2.5, 81)
Pixels = tuple[np.ndarray, np.ndarray]  # logits (K, P) float32, labels (P,)


def pixels(predict: Predictor, image: np.ndarray, mask: np.ndarray, classes: int) -> Pixels:
    logits = predict(image)
    small = np.asarray(Image.fromarray(mask).resize(logits.size[::-1], Image.Resampling.NEAREST))[::STEP, ::STEP]
    found = logits.upsampled(list(range(classes)))[:, ::STEP, ::STEP].numpy()
    known = small != IGNORE
    return found[:, known], small[known]


def hiou(found: Pixels, seen: list[int], unseen: list[int], gamma: float) -> float:
    logits, labels = found
    logits = logits.copy()
    logits[seen] -= gamma
    classes = len(logits)
    confusion = np.bincount(labels.astype(int) * classes + logits.argmax(0), minlength=classes**2)
    return scores(confusion.reshape(classes, classes), seen, unseen).hiou


def gamma_of(found: Pixels, seen: list[int], unseen: list[int], kept: float) -> float:
    logits, labels = found
    calibration.KEPT = kept
    margins = logits[seen].max(0) - logits[unseen].max(0)
    gamma = keeping_gamma(margins, logits[seen].argmax(0), np.searchsorted(seen, labels))
    assert gamma is not None
    return gamma


def measure(run_path: Path, data_root: Path) -> list[str]:
    run = load_run(run_path)
    config = run.config.dataset
    seen, unseen, count = config.seen_indices, config.unseen_indices, len(config.classes)
    text = run.text_features.numpy()
    spread = np.sqrt(((text @ run.student.spread.numpy()) * text).sum(1))[:, None] / calibration.SPREAD
    run.student.spread.zero_()
    predict, test = student_predictor(run.student, run.text_features, run.config), run.config.evaluate.split
    split = SegmentationDataset(config, data_root, "train")
    trained = [pixels(predict, *pair, count) for pair in gamma_pairs(split)]
    split = SegmentationDataset(config, data_root, test)
    tested = [pixels(predict, *split.pair(row), count) for row in range(len(split))]
    own, other = (
        (np.concatenate([logits for logits, _ in part], axis=1), np.concatenate([labels for _, labels in part]))
        for part in (trained, tested)
    )
    cells = []
    for weight in WEIGHTS:
        of_train, of_test = ((logits - weight * spread, labels) for logits, labels in (own, other))
        gammas = [0, *(gamma_of(of_train, seen, unseen, kept) for kept in KEPT)]
        shown = [hiou(of_test, seen, unseen, gamma) for gamma in gammas]
        shown.append(max(hiou(of_test, seen, unseen, gamma) for gamma in GAMMAS))
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
