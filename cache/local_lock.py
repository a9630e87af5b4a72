"""A lock on a local file, by filelock. The file names the holder and is deleted at release."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

PATIENCE, POLL = 0.2, 0.02  # seconds; the holder may just be releasing it
NATIVE = FileLock is not SoftFileLock  # systems without locks use SoftFileLock, which names its holder itself


class Held(Exception):
    """Another process holds the lock, or another part of this process."""

    def __init__(self, holder: str) -> None:
        self.host, self.pid = holder.split(" ") if holder.count(" ") == 1 else ("unknown", "unknown")


@contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold the lock while the block runs. The system releases it if the process is killed.

    Processes forked in the block do not hold it. The folder is created if it is missing.

    Raises:
        Held: it is held already.
        OSError: the file cannot be written, or its file system has no locks.
    """
    lock = FileLock(path, PATIENCE, poll_interval=POLL, fallback_to_soft=False, on_acquired=_sign if NATIVE else None)
    while True:
        try:
            lock.acquire()
            break
        except FileNotFoundError:
            continue  # the last holder has just deleted the folder too
        except Timeout:
            raise Held(holder_of(path)) from None
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # before the release: afterwards it may be another's. On Windows, release() deletes it
        lock.release()


def holder_of(path: Path) -> str:
    """Host and process id of the holder, separated by a space; empty if nobody holds it."""
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(1 if NATIVE else 0)
            return " ".join(reversed(file.read().decode().split()[:2]))
    except (FileNotFoundError, PermissionError):  # just released; Windows refuses a file that is being deleted
        return ""


def _sign(descriptor: int) -> None:
    """Write process and host as SoftFileLock does, after a first byte that is locked on Windows: nobody can read it."""
    with suppress(OSError):  # on a full disk the holder stays unknown
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f" {os.getpid()}\n{socket.gethostname()}\n".encode())
