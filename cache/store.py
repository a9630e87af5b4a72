"""Where a cache's files are: a local folder, or any fsspec URL (s3://, gs://, memory://).

A store maps keys, such as "shards/00000.json", to bytes. What is written is whole or absent, even after a kill or a
power cut, and lasts when `write` returns.
"""

import errno
import fcntl
import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from fsspec.core import url_to_fs
from zarr.abc.store import Store as ZarrStore
from zarr.storage import FsspecStore, LocalStore

from cache.lock import LOCK, being_written, heartbeat
from configs.errors import UserError

_T = TypeVar("_T")
TEMPORARY = ".tmp"  # ends the names of local files that are being written: all that a kill can leave behind
RETRY_DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # seconds; on top of what fsspec's own clients retry


class Store(ABC):
    """From `open_store`. Small, and cheap to open again in another process from its `location`."""

    location: str

    @abstractmethod
    def read(self, key: str) -> bytes:
        """FileNotFoundError if there is no such file; UserError if it cannot be read."""

    @abstractmethod
    def read_many(self, keys: Iterable[str]) -> dict[str, bytes]:
        """Those of the files that exist."""

    @abstractmethod
    def write(self, key: str, data: bytes | memoryview) -> None:
        """Puts `data` at `key`, to last when this returns; a reader sees the old file or the new one, never a part.

        UserError if it cannot be written.
        """

    @abstractmethod
    def exists(self, key: str) -> bool:
        pass

    @abstractmethod
    def delete(self, key: str) -> None:
        """It is no error if there is no such file."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Bytes of every file, by key, sorted; without the lock."""

    @abstractmethod
    def lock(self) -> AbstractContextManager[Callable[[], None]]:
        """Held by one process at a time, until the block ends or the process dies; not re-entrant.

        Yields a function that raises UserError if the lock was lost, which only a store behind a network can do.

        Raises:
            UserError: another process holds it.
        """

    @abstractmethod
    def as_zarr(self, prefix: str) -> ZarrStore:
        """What is below `prefix`, for Zarr to read parts of files, within `attempt`."""

    @abstractmethod
    def attempt(self, verb: str, key: str, action: Callable[[], _T]) -> _T:
        """What `action` returns, which does "read", say, to `key`; the store's errors become UserError.

        Behind a network it is tried again for half a minute.
        """

    def show(self, key: str) -> str:
        """The file's path or URL, for messages."""
        return f"{self.location}/{key}"


def open_store(location: str | Path) -> Store:
    """The store at a path or a URL, which need not exist yet; UserError if it cannot be one."""
    text = str(location)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    return UrlStore(text) if "://" in text else FolderStore(Path(text))


def absolute(location: str | Path) -> str:
    """The location as another process, with another working directory, can open it."""
    return str(location) if "://" in str(location) else str(Path(location).absolute())


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
            _sync_directory(path.parent)

    def exists(self, key: str) -> bool:
        return (self.root / key).is_file()

    def delete(self, key: str) -> None:
        path = self.root / key
        with self._explaining("delete", key), suppress(FileNotFoundError):
            path.unlink()
            _sync_directory(path.parent)

    def sizes(self) -> dict[str, int]:
        files = (Path(folder, name) for folder, _, names in os.walk(self.root) for name in names)
        found = {file.relative_to(self.root).as_posix(): file.stat().st_size for file in files}
        found.pop(LOCK, None)
        return dict(sorted(found.items()))

    @contextmanager
    def lock(self) -> Iterator[Callable[[], None]]:
        """The kernel frees it when the process dies, however it does; the file goes when the block ends."""
        path = self.root / LOCK
        with self._explaining("lock", LOCK):
            _make_directory(self.root)
            descriptor = _lock_file(path)
        try:
            if descriptor is None:
                host, _, pid = path.read_text().partition(" ") if path.exists() else ("", "", "")
                raise being_written(self.location, host or "unknown", pid or "unknown", "wait for it, or stop it")
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{socket.gethostname()} {os.getpid()}".encode())
            yield lambda: None
        finally:
            if descriptor is not None:
                with suppress(OSError):
                    path.unlink()
                os.close(descriptor)

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
            }.get(error.errno or 0, "mend its permissions or the disk, or choose another --cache")
            raise UserError(f"cannot {verb} {self.show(key)} ({error.strerror or error}): {cure}") from error


def _lock_file(path: Path) -> int | None:
    """A descriptor that holds the lock, or None if another process does. The holder deletes the file in the end."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # deleted by its holder after it was opened here: the lock is on a nameless file


def _make_directory(path: Path) -> None:
    """Creates `path` and its parents where they are missing, on disk when this returns."""
    if not path.is_dir():
        _make_directory(path.parent)
        path.mkdir(exist_ok=True)
        _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    """A file's name is its directory's content: it survives a power cut only once the directory is flushed too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class UrlStore(Store):
    """Object stores put a file in place whole, and it lasts when they say so."""

    def __init__(self, url: str) -> None:
        self.location = url.rstrip("/")
        try:
            self._files, root = url_to_fs(self.location, use_listings_cache=False)  # others write there too
        except ImportError as error:
            raise UserError(f"{self.location}: {error}: install that package, or choose another --cache") from error
        except ValueError as error:
            raise UserError(f"{self.location} is no location for a cache ({error}): correct --cache") from error
        self._root = root.rstrip("/")

    def read(self, key: str) -> bytes:
        return self.attempt("read", key, lambda: self._files.cat_file(self._path(key)))

    def read_many(self, keys: Iterable[str]) -> dict[str, bytes]:
        paths = {self._path(key): key for key in keys}

        def read() -> dict[str, bytes]:
            # All at once; what comes back is named as the file system likes, in the order asked for.
            found = self._files.cat(list(paths), on_error="return") if paths else {}
            found = {path.lstrip("/"): data for path, data in found.items()}
            contents = {key: found[path.lstrip("/")] for path, key in paths.items()}
            for data in contents.values():
                if isinstance(data, Exception) and not isinstance(data, FileNotFoundError):
                    raise data
            return {key: data for key, data in contents.items() if not isinstance(data, Exception)}

        return self.attempt("read", next(iter(paths.values()), ""), read)

    def write(self, key: str, data: bytes | memoryview) -> None:
        self.attempt("write", key, lambda: self._files.pipe_file(self._path(key), bytes(data)))

    def create(self, key: str, data: bytes) -> bool:
        """Writes the file unless it exists, which stores tell at once where they can; whether it was written."""

        def create() -> bool:
            if self._exists(key):
                return False
            try:
                self._files.pipe_file(self._path(key), data, mode="create")
            except FileExistsError:
                return False
            except (NotImplementedError, TypeError, ValueError):  # no such mode
                self._files.pipe_file(self._path(key), data)
            return True

        return self.attempt("write", key, create)

    def exists(self, key: str) -> bool:
        return self.attempt("read", key, lambda: self._exists(key))

    def _exists(self, key: str) -> bool:
        try:  # its own `exists` takes every error for a no
            return bool(self._files.info(self._path(key))["type"] == "file")
        except FileNotFoundError:
            return False

    def delete(self, key: str) -> None:
        def delete() -> None:
            with suppress(FileNotFoundError):
                self._files.rm_file(self._path(key))

        self.attempt("delete", key, delete)

    def sizes(self) -> dict[str, int]:
        def find() -> dict[str, Any]:
            try:
                return dict(self._files.find(self._root, detail=True))
            except FileNotFoundError:
                return {}

        start = len(self._root.lstrip("/")) + 1
        found = {path.lstrip("/")[start:]: about["size"] for path, about in self.attempt("read", "", find).items()}
        found.pop(LOCK, None)
        return dict(sorted(found.items()))

    def lock(self) -> AbstractContextManager[Callable[[], None]]:
        return heartbeat(self)

    def as_zarr(self, prefix: str) -> ZarrStore:
        return FsspecStore.from_url(f"{self.location}/{prefix}", read_only=True)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def attempt(self, verb: str, key: str, action: Callable[[], _T]) -> _T:
        for delay in (*RETRY_DELAYS, None):
            try:
                return action()
            except Exception as error:
                if isinstance(error, FileNotFoundError) and verb == "read":
                    raise
                if not _is_of_the_store(error):
                    raise  # a mistake of ours
                if delay is None or _is_final(error):
                    reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
                    raise UserError(
                        f"cannot {verb} {self.show(key)} ({reason}): check the URL, the credentials and the network, "
                        "then run the same command again"
                    ) from error
                time.sleep(delay)
        raise AssertionError


def _is_of_the_store(error: Exception) -> bool:
    """Clients raise OSError, or classes of their libraries, none of which is needed here to tell."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in (
        "aiobotocore", "aiohttp", "asyncio", "botocore", "fsspec", "gcsfs", "google", "s3fs"
    )  # fmt: skip


def _is_final(error: Exception) -> bool:
    """Errors that no waiting mends."""
    final = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, final) or "Credentials" in type(error).__name__ or "Validation" in type(error).__name__
