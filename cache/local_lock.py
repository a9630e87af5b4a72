"""A lock on a local file, by filelock, that says who holds it and leaves no file behind."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

PATIENCE, POLL = 0.2, 0.02  # seconds: a holder that is just going deletes the file, and may have it opened meanwhile


class Held(Exception):
    """Another process has the lock, or this one in another place."""

    def __init__(self, holder: str) -> None:
        self.host, self.pid = holder.split(" ") if holder.count(" ") == 1 else ("unknown", "unknown")


@contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Holds the lock while the block runs; the system frees it when the process dies, however it does.

    A process that was forked meanwhile does not hold it. The folder is made where it is missing.

    Raises:
        Held: somebody else has it.
        OSError: the file cannot be written, or its file system has no locks.
    """
    lock = FileLock(path, PATIENCE, poll_interval=POLL, fallback_to_soft=False, on_acquired=_sign)
    while True:
        try:
            lock.acquire()
            break
        except FileNotFoundError:
            continue  # a holder has just deleted the folder too
        except Timeout:
            raise Held(holder_of(path)) from None
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held, or it might be another's; Windows deletes it at release
        lock.release()


def holder_of(path: Path) -> str:
    """Host and process id of the holder, with a space between; empty if there is none."""
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(1)
            return file.read().decode()
    except FileNotFoundError:  # it may just have finished
        return ""


def _sign(descriptor: int) -> None:
    """On Windows nobody else can read the first byte: it is what is locked."""
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"\n{socket.gethostname()} {os.getpid()}".encode())
