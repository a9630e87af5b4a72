"""Checkpoints: one folder each, written atomically, and trusted only if all checksums match.

checkpoints/000400/config.yaml, student.safetensors    what `evaluate` needs: the folder is itself a run
training.safetensors                all other tensors, under their path in the state
state.json                          the state, with the names of its tensors in their place
SHA256SUMS                          of the files above, as `sha256sum -c` reads it
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cache.folder import flush
from configs.errors import UserError
from stages.common.progress import say
from stages.common.runs import CHECKPOINTS, STATE, not_finite

TENSORS, SUMS = "training.safetensors", "SHA256SUMS"
_TENSOR = "tensor: "  # stands before a tensor's name in state.json


class Checkpoints:
    """The checkpoints of one run, numbered by iteration."""

    def __init__(self, run: Path, keep: int) -> None:
        """`keep`: how many of the last checkpoints to keep; the best one is always kept."""
        self.folder, self.keep = run / CHECKPOINTS, keep

    def path(self, iteration: int) -> Path:
        return self.folder / f"{iteration:06d}"

    def iterations(self) -> list[int]:
        """Iterations of all checkpoints, ascending, including damaged ones."""
        return sorted(int(path.name) for path in self.folder.glob("[0-9]*") if path.name.isdigit())

    def save(self, iteration: int, state: dict[str, Any], write_run: Callable[[Path], None]) -> None:
        """Returns when the checkpoint is on disk; a kill before that leaves none.

        Args:
            iteration: later than all existing ones.
            state: nested dicts and lists of tensors and JSON values.
            write_run: writes the files that make a folder a run.

        Raises:
            UserError: writing fails, or a value is not finite.
        """
        path, tensors = self.path(iteration), dict[str, Tensor]()
        content = json.dumps(_take_tensors(state, "", tensors))
        if wrong := not_finite(tensors):
            raise UserError(
                f"{wrong} is not finite after iteration {iteration}, so nothing was saved: lower train.lr, in another "
                "--run"
            )
        try:
            aside = self.folder / ".partial"
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            write_run(aside)
            (aside / STATE).write_text(content)
            save_file(tensors, aside / TENSORS)
            names = sorted(file.name for file in aside.iterdir())
            (aside / SUMS).write_text("".join(f"{_sha256(aside / name)}  {name}\n" for name in names))
            for file in aside.iterdir():
                flush(file)
            flush(aside)
            aside.rename(path)
            flush(self.folder)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot save {path} ({error}): free some space or fix the disk; then continue with train --run "
                f"{path.parents[1]}"
            ) from error

    def prune(self, best: int | None) -> None:
        """Delete all checkpoints except the last ones and `best`."""
        found = self.iterations()
        for iteration in found[: -self.keep]:
            if iteration != best:
                _delete(self.path(iteration))

    def newest(self) -> dict[str, Any] | None:
        """The state of the newest good checkpoint; later, damaged ones are deleted. None if there are no checkpoints.

        Raises:
            UserError: all are damaged.
        """
        shutil.rmtree(self.folder / ".partial", ignore_errors=True)  # what a kill left
        reasons = []
        for iteration in reversed(self.iterations()):
            path = self.path(iteration)
            reason, tensors = damage(path), dict[str, Tensor]()
            if reason is None:
                tensors = load_file(path / TENSORS)
                wrong = not_finite(tensors)  # older versions saved these
                reason = f"{wrong} is not finite" if wrong else None
            if reason is None:
                for later in self.iterations():
                    if later > iteration:
                        _delete(self.path(later))
                content = json.loads((path / STATE).read_text())
                state: dict[str, Any] = _put_tensors(content, tensors)
                return state
            say(f"warning: checkpoint {path} is damaged ({reason}): continuing from the previous one")
            reasons.append(reason)
        if reasons:
            raise UserError(
                f"every checkpoint in {self.folder} is damaged: restore one, or delete {self.folder} to start again"
            )
        return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, if anything."""
    try:
        sums = [line.split("  ") for line in (checkpoint / SUMS).read_text().splitlines()]
        listed = {name: digest for digest, name in sums}
        missing = {STATE, TENSORS} - listed.keys()
        if missing:
            return f"{SUMS} lacks {missing.pop()}"
        for name, digest in listed.items():
            if _sha256(checkpoint / name) != digest:
                return f"{name} has changed"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _take_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, with its tensors moved to `tensors` under dotted names: optimizer.state.12.exp_avg."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return _TENSOR + name
    if isinstance(value, dict):
        return {str(key): _take_tensors(part, f"{name}.{key}" if name else str(key), tensors)
                for key, part in value.items()}  # fmt: skip
    if isinstance(value, (list, tuple)):
        return [_take_tensors(part, f"{name}.{index}", tensors) for index, part in enumerate(value)]
    return value


def _put_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_take_tensors`; numeric keys (an optimiser's parameters) become numbers again."""
    if isinstance(value, str) and value.startswith(_TENSOR):
        return tensors[value.removeprefix(_TENSOR)]
    if isinstance(value, dict):
        return {int(key) if key.isdigit() else key: _put_tensors(part, tensors) for key, part in value.items()}
    if isinstance(value, list):
        return [_put_tensors(part, tensors) for part in value]
    return value


def _delete(path: Path) -> None:
    """Rename before deleting: a half-deleted folder must not look like a checkpoint."""
    aside = path.with_name(".deleted")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
