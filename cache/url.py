"""A cache on an object store, or at any other fsspec URL."""

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from typing import Any, TypeVar

from fsspec.core import url_to_fs
from zarr.abc.store import Store as ZarrStore
from zarr.storage import FsspecStore

from cache.base import Store
from cache.lock import LOCK, heartbeat, holder_of
from configs.errors import UserError, reason

_T = TypeVar("_T")
RETRY_DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # seconds; on top of what fsspec's own clients retry


class UrlStore(Store):
    """Object stores write files atomically, and durably once they confirm."""

    def __init__(self, url: str) -> None:
        self.location = url.rstrip("/")
        try:
            self._files, root = url_to_fs(self.location, use_listings_cache=False)  # others write there too
        except ImportError as error:
            raise UserError(f"{self.location}: {error}: install that package, or choose another --cache") from error
        except ValueError as error:
            raise UserError(f"{self.location} is not a valid cache location ({error}): correct --cache") from error
        self._root = root.rstrip("/")

    def read(self, key: str) -> bytes:
        return self.attempt("read", key, lambda: self._files.cat_file(self._path(key)))

    def read_many(self, keys: Iterable[str]) -> dict[str, bytes]:
        paths = {self._path(key): key for key in keys}

        def read() -> dict[str, bytes]:
            # All at once; file systems differ in how they write the paths of the results.
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
        """Write the file unless it exists, atomically if the store can; returns whether it was written."""

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

    def holder(self) -> str:
        return str(holder_of(self).get("token", ""))

    def free_bytes(self) -> None:
        return None

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
                    raise  # a bug
                if delay is None or _is_final(error):
                    raise UserError(
                        f"cannot {verb} {self.show(key)} ({reason(error)}): check the URL, the credentials and the "
                        "network, then run the same command again"
                    ) from error
                time.sleep(delay)
        raise AssertionError


def _is_of_the_store(error: Exception) -> bool:
    """Clients raise OSError or their libraries' own classes, which are recognised by name, without importing them."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in (
        "aiobotocore", "aiohttp", "asyncio", "botocore", "fsspec", "gcsfs", "google", "s3fs"
    )  # fmt: skip


def _is_final(error: Exception) -> bool:
    """Errors for which retrying is useless."""
    final = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, final) or "Credentials" in type(error).__name__ or "Validation" in type(error).__name__
