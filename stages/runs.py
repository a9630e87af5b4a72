"""A run's folder: the resolved configuration, the student's weights, the class features. Enough to run alone."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs.errors import UserError
from configs.load import as_settings, resolve
from configs.schema import Config
from pipeline.student.student import Student

RUNS = Path("runs")
CONFIG, WEIGHTS = "config.yaml", "student.safetensors"
_TEXT = "text_features"


@dataclass
class Run:
    """A trained student, ready for inference. `text_features`: (K, C) of all classes of its dataset."""

    path: Path
    config: Config
    student: Student
    text_features: Tensor
    iteration: int


def new_run(path: Path | None, dataset: str) -> Path:
    """An empty folder for a run: `path`, or the next free number below runs/.

    Raises:
        UserError: `path` holds something.
    """
    if path is None:
        taken = [
            int(p.name.rpartition("-")[2]) for p in RUNS.glob(f"{dataset}-*") if p.name.rpartition("-")[2].isdigit()
        ]
        path = RUNS / f"{dataset}-{max(taken, default=0) + 1:03d}"
    if path.exists() and any(path.iterdir()):
        raise UserError(f"--run {path} is not empty: choose another folder, or delete it")
    path.mkdir(parents=True, exist_ok=True)
    return path


def newest_run() -> Path:
    """The run below runs/ whose weights were saved last."""
    weights = sorted(RUNS.glob(f"*/{WEIGHTS}"), key=lambda path: path.stat().st_mtime)
    if not weights:
        raise UserError(f"no trained run below {RUNS}/: run train first, or name one by --run")
    return weights[-1].parent


def save_config(path: Path, config: Config) -> None:
    _replace(path / CONFIG, lambda aside: aside.write_text(yaml.safe_dump(as_settings(config), sort_keys=False)))


def save_student(path: Path, student: Student, text_features: Tensor, iteration: int) -> None:
    """Weights and class features in one file, put in place whole."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in student.state_dict().items()}
    tensors[_TEXT] = text_features.cpu().contiguous()
    _replace(path / WEIGHTS, lambda aside: save_file(tensors, aside, metadata={"iteration": str(iteration)}))


def _replace(path: Path, write: Any) -> None:
    aside = path.with_name(f".{path.name}.partial")
    write(aside)
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)


def load_run(path: Path, device: str = "cpu") -> Run:
    """A trained run, its student in eval mode.

    Raises:
        UserError: no run there, or its files are damaged or do not belong together.
    """
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise UserError(
                f"{path} holds no {name}: it is no run, or one killed before its first checkpoint; run train"
            )
    try:
        settings = yaml.safe_load((path / CONFIG).read_text())
        tensors = {}
        with safe_open(path / WEIGHTS, framework="pt") as file:
            iteration = int(file.metadata()["iteration"])
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensors[name] = file.get_tensor(name)
        text_features = tensors.pop(_TEXT)
    except (yaml.YAMLError, SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{path}: {CONFIG} or {WEIGHTS} is damaged ({error}): train again") from error
    config = resolve(base=settings)
    student = Student(config.student, text_features.shape[1], load_weights=False)
    try:
        student.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"{path / WEIGHTS} does not fit student {config.student.model} of {CONFIG}: train again"
        ) from error
    return Run(path, config, student.to(device).eval(), text_features.to(device), iteration)
