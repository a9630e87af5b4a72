"""Measures how long steps take, and how much of that is waiting for images."""

import json
import time
from pathlib import Path

from stages.train.batches import Batches
from stages.train.log import cut

TIMING = "timing.jsonl"


class Pace:
    """Writes every step's seconds to timing.jsonl, separate from the losses, which are the same in every run."""

    def __init__(self, run: Path, batches: Batches, start: int) -> None:
        """Continues the file of a run after iteration `start`."""
        cut(run / TIMING, start)
        self._batches, self._file = batches, (run / TIMING).open("a", buffering=1)
        self._seconds = self._waited = 0.0

    def step(self, iteration: int) -> None:
        """Call at the end of a step; the step starts when its batch is requested."""
        seconds, waited = time.perf_counter() - self._batches.asked, self._batches.waited
        self._seconds, self._waited = self._seconds + seconds, self._waited + waited
        line = {"iteration": iteration, "seconds": round(seconds, 6), "waited": round(waited, 6)}
        self._file.write(json.dumps(line) + "\n")

    def note(self) -> str:
        """The fraction of time since the last note spent waiting, for the progress line."""
        share = self._waited / self._seconds if self._seconds else 0.0
        self._seconds = self._waited = 0.0
        return f"{share:.1%} waiting for images"

    def close(self) -> None:
        self._file.close()
