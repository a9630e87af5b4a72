"""A cache in a local folder: whole or absent files, even after a kill or a power cut, and a lock on a file."""

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from zarr.abc.store import Store as ZarrStore
from zarr.storage import LocalStore

from cache.base import TEMPORARY, Store
from cache.local_lock import Held, holder_of, lock_file
from cache.lock import LOCK, being_written
from configs.errors import UserError

_T = TypeVar("_T")


class FolderStore(Store):
    def __init__(self, root: Path) -> None:
        if root.exists() and not root.is_dir():
            raise UserError(f"{root} exists and is not a cache, which is a folder: choose another --cache")
        self.root = root
        self.location = str(root)

    def read(self, key: str) -> bytes:
        with self._explaining("read", key):
            return (self.root / key).read_bytes()

    def read_many(self, keys: Iterable[str]) -> dict[str, bytes]:
        found = {}
        for key in keys:
            with suppress(FileNotFoundError):
                found[key] = self.read(key)
        return found

    def write(self, key: str, data: bytes | memoryview) -> None:
        path = self.root / key
        unplaced = path.with_name(path.name + TEMPORARY)
        with self._explaining("write", key):
            _make_directory(path.parent)
            try:
                with unplaced.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(unplaced, path)
            except OSError:
                with suppress(OSError):
                    unplaced.unlink()  # on a full disk, every byte counts
                raise
            flush(path.parent)

    def exists(self, key: str) -> bool:
        return (self.root / key).is_file()

    def delete(self, key: str) -> None:
        path = self.root / key
        with self._explaining("delete", key), suppress(FileNotFoundError):
            path.unlink()
            flush(path.parent)

    def sizes(self) -> dict[str, int]:
        found = {}
        for file in (Path(folder, name) for folder, _, names in os.walk(self.root) for name in names):
            with suppress(FileNotFoundError):  # a writer at work puts temporary files in place
                found[file.relative_to(self.root).as_posix()] = file.stat().st_size
        found.pop(LOCK, None)
        return dict(sorted(found.items()))

    @contextmanager
    def lock(self) -> Iterator[Callable[[], None]]:
        """Released by the system if the process is killed; the file is deleted when the block ends."""
        with ExitStack() as stack:
            with self._explaining("lock", LOCK):
                _make_directory(self.root)
                stack.callback(_remove_if_empty, self.root)  # nothing was written
                try:
                    stack.enter_context(lock_file(self.root / LOCK))
                except Held as held:
                    raise being_written(self.location, held.host, held.pid, "wait for it, or stop it") from None
            yield lambda: None

    def holder(self) -> str:
        return holder_of(self.root / LOCK)

    def free_bytes(self) -> int:
        existing = next(path for path in (self.root, *self.root.absolute().parents) if path.is_dir())
        return shutil.disk_usage(existing).free

    def as_zarr(self, prefix: str) -> ZarrStore:
        return LocalStore(self.root / prefix, read_only=True)

    def attempt(self, verb: str, key: str, action: Callable[[], _T]) -> _T:
        with self._explaining(verb, key):
            return action()

    @contextmanager
    def _explaining(self, verb: str, key: str) -> Iterator[None]:
        """Turns what the system says of a full disk or a read-only folder into a line for the user."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            cure = {
                errno.ENOSPC: "free some space, then run the same command again, it continues",
                errno.EDQUOT: "free some space, then run the same command again, it continues",
                errno.ENOLCK: "keep the cache on a file system that has locks",
                errno.ENOTSUP: "keep the cache on a file system that has locks",
                errno.ENOSYS: "keep the cache on a file system that has locks",
            }.get(error.errno or 0, "mend its permissions or the disk, or choose another --cache")
            raise UserError(f"cannot {verb} {self.show(key)} ({error.strerror or error}): {cure}") from error


def _remove_if_empty(path: Path) -> None:
    with suppress(OSError):
        path.rmdir()


def _make_directory(path: Path) -> None:
    """Creates `path` and its parents where they are missing, on disk when this returns."""
    if not path.is_dir():
        _make_directory(path.parent)
        path.mkdir(exist_ok=True)
        flush(path.parent)


def flush(path: Path) -> None:
    """Returns when the file or folder is on disk.

    A file's name is its directory's content: it survives a power cut only once the directory is flushed too. Windows
    cannot open folders; its file system keeps a journal of names.
    """
    folder = path.is_dir()
    if folder and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows can only flush writable files
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
