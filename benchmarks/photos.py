"""Photos: a student beside the teacher that it is to replace, where nobody drew the images.

    python benchmarks/photos.py --data-root DIR              # all rows, three seeds; hours on two cores
    python benchmarks/photos.py --data-root DIR --split second --rows "with local distillation"

DIR holds MSRC v2 (Shotton et al. 2006, Microsoft Research Cambridge; for research): `photos/ID.jpg`, `masks/ID.png`
with the index of a class in `names.txt` or 255, `train.txt`, `val.txt`, and `text_features.npy`, (20, 512) float32,
CLIP ViT-B/16's text vectors of the 20 names. What is done stays below ./runs and is not done again.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from photos_teacher import make_teacher
from PIL import Image

from configs.ablation import read_ablation
from configs.dataset import Dataset
from configs.load import dataset_settings, resolve
from configs.schema import Config
from pipeline.data.dataset import IGNORE, SegmentationDataset
from pipeline.metrics import Scores, predicted_mask
from pipeline.pictures import colourise, contact_sheet, legend, stacked
from stages.apply.evaluate import evaluate_predictor
from stages.apply.predictor import Predictor, student_predictor, teacher_predictor
from stages.common.runs import RUNS, load_run
from stages.studies.ablate import Result, ablate, read_csv

FOLDER = RUNS / "photos"
HERE = Path(__file__).parent
# The first came with the data. The others are the first four draws of numpy.random.default_rng(2026).choice(20, 5,
# replace=False), each made before its first run. Calibration and the learning rate were chosen on the first three; the
# last two are their test.
SPLITS = {
    "first": ("sheep", "aeroplane", "chair", "road", "dog"),
    "second": ("building", "cow", "water", "sign", "bird"),
    "third": ("sky", "bird", "book", "cat", "dog"),
    "fourth": ("grass", "tree", "dog", "sky", "book"),
    "fifth": ("car", "sign", "road", "tree", "dog"),
}
PAPER, OURS = "the paper's losses", "with local distillation"
PICTURES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--split", choices=SPLITS, default="first", help="which classes are unseen")
    parser.add_argument("--rows", nargs="*", help="of configs/ablations/local.yaml; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    name = "photos" if chosen.split == "first" else f"photos-{chosen.split}"
    dataset_file = write_dataset(chosen.data_root, chosen.split)
    dataset = Dataset.model_validate(dataset_settings(str(dataset_file)))
    own = teacher_settings(dataset, chosen.data_root)

    def settings_of(assignments: Sequence[str]) -> Config:
        return resolve(str(dataset_file), HERE / "photos.yaml", [*own, *assignments])

    _, table = read_ablation("local")
    if chosen.rows:
        rows = {row: table.rows[row] for row in chosen.rows}
        signs = tuple(sign for sign in table.signs if {sign.better, sign.worse} <= rows.keys())
        table = table.model_copy(update={"rows": rows, "signs": signs})
    command = "python benchmarks/photos.py --data-root DIR" + ("" if name == "photos" else f" --split {chosen.split}")
    if chosen.rows:
        command += " --rows " + " ".join(f'"{row}"' for row in chosen.rows)
    ablate(name, table, chosen.seeds, settings_of, command, chosen.data_root, HERE, "cpu")
    write_report(name, settings_of([]), chosen.data_root, read_csv(HERE / f"{name}.csv"))


def write_dataset(data_root: Path, split: str) -> Path:
    """The dataset's YAML."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    files = {"images": "photos/{id}.*", "masks": "masks/{id}.png"}
    content = {
        "name": "msrc",
        "splits": {part: {**files, "ids": f"{part}.txt"} for part in ("train", "val")},
        "classes": str((data_root / "names.txt").absolute()),
        "unseen": list(SPLITS[split]),
        "text_features": str((data_root / "text_features.npy").absolute()),
    }
    path = FOLDER / f"{split}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def teacher_settings(dataset: Dataset, data_root: Path) -> list[str]:
    """Makes the teacher, once, and says how it is used."""
    model, weights = FOLDER / "teacher.json", FOLDER / "teacher.safetensors"
    if not weights.exists():
        *_, precision = make_teacher(dataset, data_root, FOLDER)
        print(f"teacher: mean average precision of the tags of `val` {precision:.1f} %")
    return [f"teacher.model={model}", f"teacher.pretrained={weights}"]


def write_report(name: str, config: Config, data_root: Path, results: Sequence[Result]) -> None:
    """Adds to the table what a table of rows does not say: the teacher, each unseen class, and what it looks like."""
    dataset = SegmentationDataset(config.dataset, data_root, "val")
    teacher = teacher_predictor(config, "cpu")
    of_teacher = evaluate_predictor(teacher, dataset, [0.0])[0]
    shown: dict[str, tuple[Predictor, float]] = {"teacher's dense": (teacher, 0.0)}
    lines = ["", "| what | seed | gamma | mIoU seen | mIoU unseen | hIoU | hIoU at gamma 0 | hIoU / teacher's | "]
    lines[-1] += " | ".join(config.dataset.unseen) + " |"
    lines += ["|" + "---|" * (8 + len(config.dataset.unseen))]
    lines += [line("teacher's dense tokens", "-", 0.0, of_teacher, of_teacher.hiou, of_teacher, config)]
    for result in results:
        run = load_run(RUNS / "ablations" / result.fingerprint)
        predict = student_predictor(run.student, run.text_features, config)
        plain, own = evaluate_predictor(predict, dataset, [0.0, result.gamma])
        lines += [line(result.row, str(result.seed), result.gamma, own, plain.hiou, of_teacher, config)]
        if result.seed == 0 and result.row in (PAPER, OURS):
            shown[result.row] = predict, result.gamma
    report = HERE / f"{name}.md"
    report.write_text(report.read_text() + "\n".join(lines) + "\n")
    picture(config, dataset, shown).save(HERE / f"{name}-masks.png")


def line(what: str, seed: str, gamma: float, scores: Scores, plain: float, teacher: Scores, config: Config) -> str:
    values = [scores.miou_seen, scores.miou_unseen, scores.hiou, plain]
    cells = [what, seed, f"{gamma:.3g}", *(f"{value:.1f}" for value in values), f"{scores.hiou / teacher.hiou:.2f}"]
    cells += [f"{scores.iou[index]:.0f}" for index in map(config.dataset.classes.index, config.dataset.unseen)]
    return "| " + " | ".join(cells) + " |"


def picture(config: Config, dataset: SegmentationDataset, shown: dict[str, tuple[Predictor, float]]) -> Image.Image:
    """Masks alone: the photos may not be passed on. Photos with an unseen class, evenly chosen."""
    seen, unseen = config.dataset.seen_indices, config.dataset.unseen_indices
    having = [row for row in range(len(dataset)) if np.isin(dataset.mask(row), unseen).mean() > 0.1]
    rows = having[:: max(1, len(having) // PICTURES)][:PICTURES]
    lines = []
    for row in rows:
        image, mask = dataset.pair(row)
        labels = [mask]
        for predict, gamma in shown.values():
            found = predicted_mask(predict(image), mask.shape, seen, unseen, gamma)
            labels.append(np.where(mask == IGNORE, IGNORE, found).astype(np.uint8))
        lines.append([colourise(each) for each in labels])
    names = {i: f"{n}*" if n in config.dataset.unseen else n for i, n in enumerate(config.dataset.classes)}
    sheet = contact_sheet(lines, ("true mask", *shown), [dataset.ids[row] for row in rows])
    return stacked([sheet, legend(names)])


if __name__ == "__main__":
    main()
