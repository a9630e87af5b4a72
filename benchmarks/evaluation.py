"""Images per second of `evaluate`, beside another checkout's, such as the commit before.

    python benchmarks/evaluation.py --data-root DIR --beside ../clip-zss-before

DIR is that of benchmarks/photos.py. Its first 200 photos are scored, short side 192 as in benchmarks/photos.yaml, with
random weights: the time does not depend on them. In each round each checkout has a process, one after the other; the
first ten photos are a warm-up. Every IoU must be equal to 0.01 points: torch's last bits depend on its threads.
Prints the table of evaluation.md. CPU time is that of all threads; other work disturbs it less than the clock.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
PHOTOS, GAMMA = 200, 0.1


def measure(folder: Path, data_root: Path) -> dict[str, object]:
    """Of the checkout on PYTHONPATH: images per second, CPU milliseconds per image, and the IoUs."""
    import torch

    from configs.load import resolve
    from pipeline.data.dataset import SegmentationDataset
    from pipeline.student.student import Student
    from stages.apply.evaluate import evaluate_predictor, student_predictor
    from stages.common.devices import keep_freed_memory

    keep_freed_memory()
    config = resolve(str(folder / "photos.yaml"), HERE / "photos.yaml")
    dataset = SegmentationDataset(config.dataset, data_root, "train")
    torch.manual_seed(0)
    student = Student(config.student.model_copy(update={"weights": "none"}), 512).eval()
    text_features = torch.nn.functional.normalize(torch.randn(len(config.dataset.classes), 512), dim=1)
    predict, ids = student_predictor(student, text_features, config), dataset.ids
    dataset.ids = ids[:10]
    evaluate_predictor(predict, dataset, [GAMMA])
    dataset.ids = ids
    clock, cpu = time.perf_counter(), time.process_time()
    [scores] = evaluate_predictor(predict, dataset, [GAMMA])
    cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
    return {"rate": len(ids) / clock, "cpu": 1e3 * cpu / len(ids), "iou": scores.iou}


def write_dataset(folder: Path, data_root: Path) -> None:
    import yaml

    names = (data_root / "names.txt").read_text().split("\n")
    dataset = {
        "name": "photos", "root": ".", "limit": PHOTOS, "classes": [name for name in names if name],
        "unseen": ["sheep", "aeroplane", "chair", "road", "dog"],
        "splits": {"train": {"images": "photos/{id}.jpg", "masks": "masks/{id}.png", "ids": "train.txt"}},
    }  # fmt: skip
    (folder / "photos.yaml").write_text(yaml.safe_dump(dataset))


def run(checkout: Path, folder: Path, data_root: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", str(folder), "--data-root", str(data_root)]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(command, env=environment, check=True, text=True, stdout=subprocess.PIPE, cwd=folder)
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    data_root = asked.data_root.resolve()
    if asked.one:
        print(json.dumps(measure(asked.one, data_root)))
        return
    with tempfile.TemporaryDirectory() as name:
        write_dataset(Path(name), data_root)
        pairs = []
        for number in range(asked.rounds):
            pairs.append([run(checkout.resolve(), Path(name), data_root) for checkout in (HERE.parent, asked.beside)])
            print(f"round {number + 1}: {pairs[-1]}", file=sys.stderr, flush=True)
            assert np.allclose(*(one["iou"] for one in pairs[-1]), atol=0.01, equal_nan=True), "they count differently"
    print("| | here, median (least to most) | beside | ratio, round by round |\n|---|---|---|---|")
    for what, key in (("images/s", "rate"), ("CPU ms an image", "cpu")):
        own, other = ([pair[place][key] for pair in pairs] for place in (0, 1))
        ratios = [a / b for a, b in zip(own, other, strict=True)]
        print(f"| {what} | {spread(own)} | {spread(other)} | {spread(ratios)} |")


if __name__ == "__main__":
    main()
