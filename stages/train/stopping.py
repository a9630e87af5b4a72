"""SIGTERM and Ctrl-C: the step at hand is finished and saved first."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from stages.common.progress import say

GRACE = 60  # seconds from a SIGTERM until a loader worker ends


class Stopped(Exception):
    """A signal interrupted work that can be repeated."""


class Stop:
    """Whether a signal asked to stop, and which."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """0 after SIGTERM, which clusters send and which is no failure; 130 after Ctrl-C, as in shells."""
        return 130 if self.signal == signal.SIGINT else 0

    def check(self) -> None:
        if self:
            raise Stopped


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Notes SIGTERM and the first SIGINT while the block runs; a second SIGINT interrupts as usual."""
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        stop.signal = signal.Signals(number)
        say(f"{stop.signal.name}: saving at the end of this step")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():  # others get no signals
        yield stop
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def outlive_signals(worker: int) -> None:
    """A DataLoader's `worker_init_fn`: a signal to all processes of a job must not end workers before the main process.

    A worker's death would raise an error in the middle of a step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "win32":  # Windows has no alarm
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))  # SIGALRM ends the worker
