"""Classes that training never met, not even unlabelled, under words it never heard (after the paper's Table 7).

    python benchmarks/generalisation.py    # in an empty folder; half an hour on two cores, what is done stays there

A second set of scenes is rendered, in which only 14 of the 20 classes occur. Students are trained on it (four of the 14
are unseen: they occur without masks), and tested on `scenes`, where the other 6 occur too: all 20 words are asked for,
and then the 6 new ones alone, on their own pixels. The teacher knows the 20 words, as CLIP knows the words of a second
dataset.
"""

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cache.reader import open_cache
from configs.load import resolve
from configs.schema import Config
from pipeline.data.scenes import CLASSES, write_scenes
from stages.apply.evaluate import evaluate, features_of
from stages.apply.predictor import Predictor, student_predictor, teacher_predictor
from stages.common.runs import load_run
from stages.precompute.stage import precompute
from stages.train.stage import train

SEEDS = (0, 1, 2)
NEW = ("moon", "arrow", "flower", "bolt", "waves", "grid")
UNSEEN = ("heart", "ring", "dots", "bricks")
KNOWN = tuple(name for name in CLASSES if name not in NEW)
SEEN = tuple(name for name in KNOWN if name not in UNSEEN)
OF_KNOWN = [
    "dataset.name=scenes-14",
    "dataset.root=scenes-14",
    "dataset.generator=null",
    f"dataset.classes=[{', '.join(KNOWN)}]",
    f"dataset.values={', '.join(str(CLASSES.index(name)) for name in KNOWN)}",
    f"dataset.unseen=[{', '.join(UNSEEN)}]",
]
OF_NEW = [
    "dataset.name=scenes-6",
    "dataset.root=scenes",
    "dataset.generator=null",
    f"dataset.classes=[{', '.join(NEW)}]",
    f"dataset.values={', '.join(str(CLASSES.index(name)) for name in NEW)}",
    f"dataset.ignore_index=[{', '.join(str(CLASSES.index(name)) for name in KNOWN)}, 255]",
    "dataset.unseen=[]",
]
TESTS = {
    "scenes-14": [*OF_KNOWN, "evaluate.gamma=0"],
    "scenes": ["evaluate.gamma=0"],
    "scenes-6": [*OF_NEW, "evaluate.gamma=0"],
}
DATA, RUNS = Path("data"), Path("runs")
Ious = dict[str, float]  # of every class, in %


def kept(file: Path, predict: Callable[[Config], tuple[Config, Predictor]], test: str) -> Ious:
    """What `file` holds, measured now if it is not there."""
    if not file.exists():
        config, predictor = predict(resolve("scenes", assignments=TESTS[test]))
        _, scores = evaluate(predictor, config, DATA)
        file.write_text(json.dumps(dict(zip(config.dataset.classes, scores.iou, strict=True))))
    found: Ious = json.loads(file.read_text())
    return found


def teacher(config: Config) -> tuple[Config, Predictor]:
    return config, teacher_predictor(config, "cpu")


def student(run: Path, config: Config) -> tuple[Config, Predictor]:
    """Asked for the words of `config`, which may be new to the run."""
    opened = load_run(run)
    config, features = features_of(config, opened, "cpu")
    return config, student_predictor(opened.student, features, config)


def trained(on: str, settings: list[str], seed: int) -> Path:
    run = RUNS / f"{on}-{seed}"
    if not (run / "student.safetensors").exists():
        config = resolve("scenes", assignments=[*settings, f"train.seed={seed}"])
        train(config, open_cache(precompute(config, DATA, None, "cpu")), DATA, run, "cpu")
    return run


def mean(found: Ious, names: Sequence[str]) -> str:
    values = [found[name] for name in names if name in found]
    return f"{np.mean(values):.1f}" if values else ""


def main() -> None:
    RUNS.mkdir(exist_ok=True)
    write_scenes(DATA / "scenes-14", names=KNOWN)
    lines = [
        "# Generalisation: classes and words that training never met",
        "",
        "`python benchmarks/generalisation.py`, which says what was done, on "
        f"{os.cpu_count()} CPU cores (torch {torch.__version__}).",
        f"Trained on `scenes-14`, whose images hold neither {', '.join(NEW[:-1])} nor {NEW[-1]}; of its classes "
        f"{', '.join(UNSEEN)} are unseen. No gamma. mIoU in %.",
        "",
        "| what | trained on | seed | tested on | words | all | seen | unseen | new |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for test in TESTS:
        rows = [("teacher's dense tokens", "", "", kept(RUNS / f"teacher.{test}.json", teacher, test))]
        for on, settings in {"scenes-14": OF_KNOWN, "scenes": []}.items():
            for seed in SEEDS:
                run = trained(on, settings, seed)
                found = kept(RUNS / f"{run.name}.{test}.json", partial(student, run), test)
                rows.append(("student", on, str(seed), found))
        for *who, found in rows:
            means = [mean(found, names) for names in (tuple(found), SEEN, UNSEEN, NEW)]
            lines.append("| " + " | ".join([*who, test, str(len(found)), *means]) + " |")
    (Path(__file__).parent / "generalisation.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
