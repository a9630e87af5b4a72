"""Lists the contents of caches/ and runs/: size, progress, scores, and differing settings."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cache.folder import FolderStore
from cache.layout import MANIFEST
from cache.manifest import flat_settings
from cache.verify import info
from configs.errors import UserError
from configs.load import merge
from stages.common.caches import CACHES
from stages.common.runs import CHECKPOINTS, CONFIG, RUNS, read_settings
from stages.train.checkpoints import Checkpoints
from stages.train.log import SCORES, read_scores


@dataclass
class Entry:
    """One cache or run. `settings`: those that differ among the caches, or runs, of its dataset, as JSON texts."""

    path: str
    dataset: str
    bytes: int
    settings: dict[str, str] = field(default_factory=dict)
    fault: str | None = None  # why it cannot be read; then the other fields mean nothing


@dataclass
class CacheEntry(Entry):
    views: int = 0  # those that are done
    views_planned: int = 0


@dataclass
class RunEntry(Entry):
    """`iteration`: of its last checkpoint. `score`: its best validation's hIoU, or mIoU where no class is unseen."""

    iteration: int = 0
    iterations: int = 0
    score: float | None = None
    score_name: str = "hiou"
    score_split: str = ""


E = TypeVar("E", bound=Entry)


def caches() -> list[CacheEntry]:
    """Entries for the folders in caches/, sorted by name."""
    entries: list[CacheEntry] = []
    settings: list[dict[str, str]] = []
    for manifest in sorted(CACHES.glob(f"*/{MANIFEST}")):
        path = manifest.parent
        try:
            found = info(path)
        except UserError as error:
            entries.append(CacheEntry(str(path), "?", _bytes(path), fault=str(error)))
            settings.append({})
            continue
        done, planned = found.views_done, found.manifest.images * found.manifest.views
        made_from = merge(found.manifest.settings, {"views": {"count": found.manifest.views}})
        entries.append(
            CacheEntry(str(path), made_from["dataset"]["name"], _bytes(path), views=done, views_planned=planned)
        )
        settings.append(flat_settings({key: value for key, value in made_from.items() if key != "files"}))
    return _with_differences(entries, settings)


def runs() -> list[RunEntry]:
    """Entries for the folders in runs/, including those of `ablate`, sorted by name."""
    entries: list[RunEntry] = []
    settings: list[dict[str, str]] = []
    for path in _run_folders():
        try:
            own = read_settings(path)
            flat = flat_settings(own)  # TypeError: YAML values that cannot be settings
            entry = _run(path, own)
        except (UserError, KeyError, TypeError) as error:
            ours = isinstance(error, UserError)
            fault = str(error) if ours else f"not a run of clip-zss: {error} in {CONFIG} or {SCORES}"
            entry, flat = RunEntry(str(path), "?", _bytes(path), fault=fault), {}
        entries.append(entry)
        settings.append(flat)
    return _with_differences(entries, settings)


def _run(path: Path, settings: Mapping[str, Any]) -> RunEntry:
    entry = RunEntry(
        str(path), settings["dataset"]["name"], _bytes(path), iterations=settings["train"]["iterations"],
        iteration=max(Checkpoints(path, keep=1).iterations(), default=0),
    )  # fmt: skip
    scores = read_scores(path)
    entry.score_name = "hiou" if not scores or "hiou" in scores[0] else "miou"
    if known := [line for line in scores if line[entry.score_name] is not None]:
        best = max(known, key=lambda line: line[entry.score_name])
        entry.score, entry.score_split = best[entry.score_name], best["split"]
    return entry


def _run_folders() -> Iterator[Path]:
    for folder, below, names in os.walk(RUNS):
        below[:] = sorted(name for name in below if name != CHECKPOINTS)  # a checkpoint is a run by itself
        if CONFIG in names:
            yield Path(folder)


def _with_differences(entries: list[E], settings: Sequence[dict[str, str]]) -> list[E]:
    """Add to `entries` the flat settings that differ among the entries of a dataset."""
    for dataset in {entry.dataset for entry in entries}:
        own = {i: settings[i] for i, entry in enumerate(entries) if entry.dataset == dataset}
        names = sorted({name for values in own.values() for name in values})
        for name in names:
            if len({values.get(name) for values in own.values()}) > 1:
                for i, values in own.items():
                    if name in values:
                        entries[i].settings[name] = values[name]
    return entries


def _bytes(folder: Path) -> int:
    return sum(FolderStore(folder).sizes().values())
