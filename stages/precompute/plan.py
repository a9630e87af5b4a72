"""The plan of stage one, printed before it starts, and its timing, kept with the cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import TypeAdapter, ValidationError

from cache.base import Store
from cache.layout import REGION_TOKENS
from cache.manifest import Manifest
from configs.errors import UserError

GROUPS = 10  # assumed average number of groups per view, for the size of region tokens; scenes have 2.4
TIMING = "timing.json"  # next to the manifest, but not part of the cache's content


@dataclass(frozen=True)
class Plan:
    """The remaining work.

    Attributes:
        bytes: upper bound, without compression except for empty rows of region tokens.
        free: free bytes in the store; None if unknown.
        seconds: estimated from a calibration on every worker.
    """

    images: int
    views: int
    shards: int
    bytes: int
    free: int | None
    workers: int
    seconds: float

    def __str__(self) -> str:
        room = "" if self.free is None else f" of {size(self.free)} free"
        return (
            f"plan: {self.views:,} views of {self.images:,} images in {self.shards:,} shards; at most "
            f"{size(self.bytes)}{room}; {self.workers} workers; about {duration(self.seconds)}"
        )

    def check_room(self, store: Store) -> None:
        """UserError if it may not fit."""
        if self.free is not None and self.bytes > self.free:
            raise UserError(
                f"{store.location} has {size(self.free)} free, and up to {size(self.bytes)} are needed: free some "
                "space, choose another --cache, or lower views.count, storage.dense_views or storage.dense_tokens"
            )


def plan(
    manifest: Manifest, shards: Sequence[tuple[int, int]], seconds_per_view: Sequence[float], free: int | None
) -> Plan:
    """The plan for the `shards` that are pending, as cache.writer.pending lists them.

    Args:
        seconds_per_view: of each worker.
    """
    images = views = size_ = 0
    for index, first_view in shards:
        start, stop = manifest.shard_rows(index)
        images += stop - start
        views += (stop - start) * (manifest.views - first_view)
        for name, spec in manifest.arrays.items():
            missing = max(0, manifest.array_views(name) - first_view)
            tail = (min(GROUPS, spec.tail[0]), spec.tail[1]) if name == REGION_TOKENS else spec.tail
            size_ += (stop - start) * missing * int(np.prod(tail)) * np.dtype(spec.dtype).itemsize
    rate = sum(1 / seconds for seconds in seconds_per_view if seconds)
    return Plan(images, views, len(shards), size_, free, len(seconds_per_view), views / rate if rate else 0.0)


class Timing:
    """Busy seconds of each part of stage one, summed over workers."""

    def __init__(self, lanes: Mapping[str, int]) -> None:
        """`lanes`: how many threads a worker has for each part."""
        self._lanes = lanes
        self._seconds = dict.fromkeys(lanes, 0.0)
        self.views = 0

    def add(self, views: int, seconds: Mapping[str, float]) -> None:
        self.views += views
        for part, spent in seconds.items():
            self._seconds[part] += spent

    @property
    def bottleneck(self) -> str:
        """The part with the most time per thread; the others wait for it."""
        return max(self._lanes, key=lambda part: self._seconds[part] / self._lanes[part])

    def __str__(self) -> str:
        total = sum(self._seconds.values()) or 1.0
        shares = ", ".join(f"{part} {100 * self._seconds[part] / total:.0f} %" for part in self._lanes)
        return f"{shares}; bottleneck: {self.bottleneck}"

    def save(self, store: Store, elapsed: float, workers: int) -> None:
        """Adds this run to the cache's timing.json."""
        busy = {part: round(self._seconds[part], 3) for part in self._lanes}
        run = TimedRun(self.views, round(elapsed, 3), workers, busy, self.bottleneck)
        store.write(TIMING, _RUNS.dump_json([*timed_runs(store), run], indent=2))


@dataclass(frozen=True)
class TimedRun:
    """One run of stage one in timing.json. `seconds` is wall time; `busy_seconds` are summed over workers."""

    views: int
    seconds: float
    workers: int
    busy_seconds: dict[str, float]
    bottleneck: str


_RUNS = TypeAdapter(list[TimedRun])


def timed_runs(store: Store) -> list[TimedRun]:
    """The runs that made a cache; empty if the file is missing or damaged."""
    try:
        return _RUNS.validate_json(store.read(TIMING))
    except (FileNotFoundError, ValidationError):
        return []


def size(count: int) -> str:
    """Format a number of bytes."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def duration(seconds: float) -> str:
    """Format a duration."""
    for unit, factor in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * factor:
            return f"{seconds / factor:.1f} {unit}"
    return f"{max(seconds, 1):.0f} s"
