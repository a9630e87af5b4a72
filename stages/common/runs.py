"""A run's folder: the resolved configuration, the student's weights, the class features. Enough to run alone."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cache.folder import flush
from cache.local_lock import Held, lock_file
from cache.manifest import different_settings
from configs.errors import UserError, writing
from configs.load import as_settings, resolve
from configs.schema import Config
from pipeline.hub import HUB, on_the_hub
from pipeline.student.student import Student
from pipeline.student.weights import TEXT, WEIGHTS

RUNS, DATA = Path("runs"), Path("data")  # DATA: the default of --data-root
CONFIG = "config.yaml"
CHECKPOINTS, STATE = "checkpoints", "state.json"  # a folder in a run; a file that only checkpoints have
_FACTS = "run"
# Settings that do not affect what a run learns: they may change when it is continued.
FREE = ("train.workers", "train.checkpoint_every", "train.keep_checkpoints", "train.checkpointing")


@dataclass
class Run:
    """A trained student, ready for inference.

    Attributes:
        text_features: (K, C) of all classes of its dataset.
        gamma: chosen for these weights in training; None before the first validation and in older runs; NaN if nothing
            determined it.
        alpha: the losses' logits are alpha R . T, with this final alpha; prediction uses R . T. None in older runs.
    """

    path: Path
    config: Config
    student: Student
    text_features: Tensor
    iteration: int
    gamma: float | None = None
    alpha: float | None = None

    def __str__(self) -> str:
        return f"{self.path} (iteration {self.iteration:,} of {self.config.train.iterations:,})"


def new_run(path: Path | None, dataset: str) -> Path:
    """An empty folder for a run: `path`, or the next free number below runs/. UserError if `path` is not empty."""
    if path is None:
        taken = [int(ending) for p in RUNS.glob(f"{dataset}-*") if (ending := p.name.rpartition("-")[2]).isdigit()]
        path = RUNS / f"{dataset}-{max(taken, default=0) + 1:03d}"
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:  # another training took it a moment ago
            return new_run(None, dataset)
    if path.exists() and any(not file.name.startswith(".") for file in path.iterdir()):
        raise UserError(f"--run {path} is not empty: choose another folder, or delete it")
    path.mkdir(parents=True, exist_ok=True)
    return path


def is_begun(path: Path) -> bool:
    """Whether the folder has a training to continue.

    Raises:
        UserError: it is a checkpoint, or has weights that no checkpoint belongs to: a training would overwrite them. Or
            it is on the hub.
    """
    if path.as_posix().startswith(HUB):
        raise UserError(
            f"--run {path.as_posix()} cannot be continued: to start from its weights, set student.weights to it"
        )
    if not (path / CONFIG).is_file():
        return False
    if (path / STATE).is_file():
        run = path.absolute().parent.parent
        last = f"to continue from the run's last one, run train --run {run}; " if is_begun(run) else ""
        raise UserError(
            f"--run {path} is a checkpoint: {last}to continue from this one, copy it to NEW/{CHECKPOINTS}/{path.name} "
            f"and its {CONFIG} to NEW, then run train --run NEW"
        )
    if list(path.glob("*.safetensors")) and not list(path.glob(f"{CHECKPOINTS}/[0-9]*")):
        raise UserError(f"--run {path} has weights, but no checkpoint to continue from: choose another folder")
    return True


def run_folder(path: Path | None, config: Config) -> Path:
    """The folder to train in: a new one, or a run with the same settings (except FREE), to be continued.

    Raises:
        UserError: the run has other settings, or the folder has other content.
    """
    if path is None or not is_begun(path):
        return new_run(path, config.dataset.name)
    differences = different_settings(read_settings(path), as_settings(config), ours="run", free=FREE)
    if differences:
        raise UserError(
            f"--run {path} has other settings ({'; '.join(differences)}): drop yours to continue it, or choose another "
            "folder"
        )
    return path


def begin_run(path: Path, config: Config) -> None:
    """Claim the folder, within `one_trainer`. UserError if another training started there a moment ago."""
    if is_begun(path):
        run_folder(path, config)
    else:
        save_config(path, config)


def read_settings(path: Path) -> dict[str, Any]:
    """A run's settings, for `resolve` to start from.

    Raises:
        UserError: they are damaged.
    """
    try:
        settings = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(settings, dict) or not settings:
            raise ValueError("no settings in it")
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise UserError(f"{path / CONFIG} is damaged ({error}): train again, in another folder") from error
    return settings


@contextmanager
def one_trainer(path: Path) -> Iterator[None]:
    """Hold the run while the block runs. The system releases it if the process is killed.

    Raises:
        UserError: another process trains it.
    """
    try:
        with lock_file(path / ".lock"):
            yield
    except Held as held:
        raise UserError(
            f"run {path} is being trained by another process (host {held.host}, process {held.pid}): wait for it, or "
            "stop it"
        ) from None


def newest_run() -> Path:
    """The run below runs/ with the most recently saved weights."""
    weights = sorted(RUNS.glob(f"*/{WEIGHTS}"), key=lambda path: path.stat().st_mtime)
    if not weights:
        raise UserError(f"no trained run below {RUNS}/: run train first, or choose one with --run")
    return weights[-1].parent


def save_config(path: Path, config: Config) -> None:
    replace_file(path / CONFIG, lambda aside: aside.write_text(yaml.safe_dump(as_settings(config), sort_keys=False)))


def save_student(
    path: Path, student: Student, text_features: Tensor, iteration: int, gamma: float | None, alpha: float | None = None
) -> None:
    """Weights and class features in one file, put in place whole; iteration, gamma and alpha are its metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in student.state_dict().items()}
    tensors[TEXT] = text_features.cpu().contiguous()
    facts = {"iteration": iteration, "gamma": gamma, "alpha": alpha}
    # One entry: several would be in any order. A file of save_file's is for its owner's eyes alone.
    content = save(tensors, {_FACTS: json.dumps(facts)})
    replace_file(path / WEIGHTS, lambda aside: aside.write_bytes(content))


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Replace a file atomically: `write` writes to the path that it is given. A kill leaves the old file or the new."""
    aside = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            write(aside)
            flush(aside)
            os.replace(aside, path)
        except OSError:
            aside.unlink(missing_ok=True)  # on a full disk, every byte counts
            raise


def load_run(path: Path, device: str = "cpu") -> Run:
    """A trained run, its student in eval mode. `path` may be `hf-hub:ORG/NAME`.

    Raises:
        UserError: there is no run, or its files are damaged or do not fit each other.
    """
    if (name := path.as_posix()).startswith(HUB):
        path = on_the_hub(name, (CONFIG, WEIGHTS), "--run")
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise UserError(f"{path} has no {name}: it is not a run, or was not validated yet: run train --run {path}")
    settings = read_settings(path)
    try:
        tensors = {}
        with safe_open(path / WEIGHTS, framework="pt") as file:
            facts = _facts(file.metadata())
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensors[name] = file.get_tensor(name)
        if wrong := not_finite(tensors):
            raise UserError(
                f"{path / WEIGHTS} has values that are not finite ({wrong}): train again with a lower train.lr"
            )
        text_features = tensors.pop(TEXT)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(
            f"{path / WEIGHTS} is damaged ({error}): train --run {path} restores it from the last checkpoint"
        ) from error
    config = resolve(base=settings, base_name=str(path / CONFIG))
    student = Student(config.student, text_features.shape[1], load_weights=False)
    try:
        student.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"{path / WEIGHTS} does not fit student {config.student.model} of {CONFIG}: train again"
        ) from error
    return Run(path, config, student.to(device).eval(), text_features.to(device), *facts)


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first that holds NaN or infinity, if one does."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)


def _facts(metadata: dict[str, str]) -> tuple[int, float | None, float | None]:
    """Iteration, gamma and alpha of the weights. ValueError, TypeError or KeyError if another program wrote them."""
    if _FACTS not in metadata:
        return int(metadata["iteration"]), None, None  # of an older run
    facts = json.loads(metadata[_FACTS])
    gamma, alpha = (None if facts.get(name) is None else float(facts[name]) for name in ("gamma", "alpha"))
    return int(facts["iteration"]), gamma, alpha
