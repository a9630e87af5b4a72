"""run.json: the cache, machine, packages and code of each start of a run."""

import json
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cache.manifest import different_settings
from cache.reader import Cache
from cache.store import name_for, place_of
from configs.errors import UserError
from configs.load import as_settings
from configs.schema import Config
from stages.common.devices import device_name
from stages.common.runs import CONFIG, FREE, RUNS, read_settings, replace_file

CODE = Path(__file__).parents[2]
FILE = "run.json"
PACKAGES = (
    "clip-zss", "torch", "torchvision", "timm", "open_clip_torch", "transformers", "faiss-gpu", "faiss-cpu", "zarr",
    "dask", "numpy", "pillow", "safetensors",
)  # fmt: skip


def record_start(run: Path, iteration: int, cache: str, fingerprint: str, device: str) -> str:
    """Add a start after `iteration` to the run's record; returns a unique name for the run."""
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "after_iteration": iteration,
        "command": sys.argv,
        "cache": name_for(cache, run) if Path(cache).is_absolute() else cache,
        "cache_fingerprint": fingerprint,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "host": platform.node(),
        "python": platform.python_version(),
        "packages": versions(),
        "git": git_state(CODE),
    }
    found = [*starts(run), start]
    replace_file(run / FILE, lambda aside: aside.write_text(json.dumps({"starts": found}, indent=2) + "\n"))
    return f"{run.absolute().name}-{re.sub('[^0-9]', '', found[0]['time'])}-{found[0]['host']}"


def starts(run: Path) -> list[dict[str, Any]]:
    """The recorded starts; empty if the record is damaged."""
    try:
        found = json.loads((run / FILE).read_text())["starts"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return found if isinstance(found, list) else []


def last_start(run: Path) -> dict[str, Any] | None:
    """The last recorded start, or None."""
    return next(reversed(starts(run)), None)


def last_cache(run: Path) -> str | None:
    """The location of the cache that the run was last started with, or None if it is not recorded."""
    last = last_start(run)
    if last is None:
        return None
    name = str(last["cache"])
    if "://" in name:
        return name
    # Relative to the run, to the working folder or to a folder above the run: a project may have been moved as a whole.
    places = [place_of(name, run), name, *(place_of(name, folder) for folder in run.absolute().parents)]
    return next((place for place in places if Path(place).is_dir()), places[0 if name.startswith("..") else 1])


def begun_with(config: Config, cache: Cache) -> Path | None:
    """The newest run in runs/ that has these settings, except FREE, and was started with this cache, if any."""
    for file in sorted(RUNS.glob(f"*/{CONFIG}"), key=lambda file: file.stat().st_mtime, reverse=True):
        last = last_start(file.parent)
        same_cache = last and last["cache_fingerprint"] == cache.manifest.fingerprint
        if same_cache and not different_settings(read_settings(file.parent), as_settings(config), free=FREE):
            return file.parent
    return None


def check_same_cache(run: Path, cache: Cache) -> None:
    """UserError if the run was last started with a cache of different content."""
    last = last_start(run)
    if last and last["cache_fingerprint"] != cache.manifest.fingerprint:
        raise UserError(
            f"--run {run} was started with cache {last_cache(run)}, but {cache.location} has other content: pass the "
            "first one as --cache, or choose another --run"
        )


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and changed files of the checkout with root `folder`; None if it is not a checkout."""
    try:
        if Path(_git(folder, "rev-parse", "--show-toplevel").strip()).resolve() != folder.resolve():
            return None  # installed somewhere below another project
        changed = _git(folder, "status", "--porcelain").splitlines()
        return {"commit": _git(folder, "rev-parse", "HEAD").strip(), "changed": changed}
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or no commit


@cache
def commit() -> str:
    """This program's short commit, with a + if files differ from it; empty if it is not a checkout."""
    state = git_state(CODE)
    return state["commit"][:12] + "+" * any(not line.startswith("??") for line in state["changed"]) if state else ""


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout


def versions() -> dict[str, str]:
    """Versions of the installed PACKAGES."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
