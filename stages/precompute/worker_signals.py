"""Loaded by the Dask workers that `precompute` starts: they ignore Ctrl-C; the main process stops them."""

import signal
import threading


def dask_setup(_worker: object) -> None:
    """Dask's hook. Tests run workers as threads, where a process's signals are not theirs to take."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
