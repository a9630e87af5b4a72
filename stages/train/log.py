"""Logs of a training run: log.jsonl and scores.jsonl, TensorBoard, and optionally Weights & Biases."""

import json
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from configs.errors import UserError, writing
from configs.load import as_settings
from configs.schema import Config

LOSSES, SCORES, BOARD = "log.jsonl", "scores.jsonl", "events.out.tfevents"


class RunLog:
    """Continues the files of a run after iteration `start`; lines of later, lost iterations are dropped.

    The JSON lines contain no times: a resumed run has the same bytes as an uninterrupted one.
    """

    def __init__(self, path: Path, config: Config, start: int, identity: str) -> None:
        """`identity` is the run's unique name for Weights & Biases."""
        self.path = path
        self._wandb = _start_wandb(path, config, identity) if config.train.wandb else None
        for name in (LOSSES, SCORES):
            cut(path / name, start)
        self._losses = (path / LOSSES).open("a", buffering=1)
        threading.excepthook = _hide_os_errors
        with writing(path / BOARD):
            self._board = SummaryWriter(str(path), purge_step=start + 1 if start else None)

    def losses(self, iteration: int, losses: dict[str, float], lr: float) -> None:
        """Log one step's losses; `lr` is that of the encoder."""
        with writing(self.path / LOSSES):
            self._losses.write(json.dumps({"iteration": iteration, **losses, "lr": lr}) + "\n")
        self._scalars({**{f"loss/{name}": value for name, value in losses.items()}, "lr": lr}, iteration)

    def scores(self, iteration: int, split: str, shown: dict[str, float]) -> None:
        """Log one validation's scores; it counts as done once this returns. NaN becomes null."""
        self._scalars({f"{split}/{name}": value for name, value in shown.items()}, iteration)
        with writing(self.path / SCORES), (self.path / SCORES).open("a") as file:
            known = {name: None if math.isnan(value) else value for name, value in shown.items()}
            file.write(json.dumps({"iteration": iteration, "split": split, **known}) + "\n")
            _flush(file)

    def picture(self, iteration: int, name: str, picture: Image.Image) -> None:
        with writing(self.path / BOARD):
            self._board.add_image(name, np.asarray(picture), iteration, dataformats="HWC")
        if self._wandb:
            self._wandb.log({"iteration": iteration, name: import_wandb().Image(picture)})

    def flush(self) -> None:
        """Return when the losses are on disk."""
        with writing(self.path / LOSSES):
            _flush(self._losses)
        with writing(self.path / BOARD):
            self._board.flush()

    def close(self) -> None:
        with writing(self.path / LOSSES):
            self._losses.close()
        with writing(self.path / BOARD):
            self._board.close()
        if self._wandb:
            self._wandb.finish()

    def _scalars(self, values: dict[str, float], iteration: int) -> None:
        with writing(self.path / BOARD):
            for name, value in values.items():
                self._board.add_scalar(name, value, iteration)
        if self._wandb:
            self._wandb.log({"iteration": iteration, **values})


def _hide_os_errors(error: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread passes an OSError on to the next write, so its own traceback is not printed."""
    if not isinstance(error.exc_value, OSError):
        threading.__excepthook__(error)


def read_scores(path: Path) -> list[dict[str, Any]]:
    """A run's validations so far, one dict each."""
    return [line for line, _ in _lines(path / SCORES)]


def is_validated(path: Path, iteration: int) -> bool:
    return any(line["iteration"] == iteration for line in read_scores(path))


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each line and its end in the file, up to the first that is damaged or, after a kill, incomplete."""
    if not path.exists():
        return
    end = 0
    with path.open("rb") as lines:
        for line in lines:
            end += len(line)
            try:
                content = json.loads(line)
            except ValueError:
                return
            if not line.endswith(b"\n") or not isinstance(content, dict) or "iteration" not in content:
                return
            yield content, end


def cut(path: Path, iteration: int) -> None:
    """Drop everything after the line of `iteration`."""
    ends = [end for line, end in _lines(path) if line["iteration"] <= iteration]
    if path.exists():
        os.truncate(path, max(ends, default=0))


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def import_wandb() -> Any:
    """Import wandb, an optional package. UserError if it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("train.wandb: the package wandb is not installed: pip install wandb, or unset it") from error
    return wandb


def _start_wandb(path: Path, config: Config, identity: str) -> Any:
    """Start or continue this run in Weights & Biases."""
    run = import_wandb().init(
        project=config.train.wandb, id=identity, name=path.name, dir=str(path),
        config=as_settings(config), resume="allow",
    )  # fmt: skip
    run.define_metric("*", step_metric="iteration")
    return run
