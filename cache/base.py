"""The interface of a file store: a folder (cache/folder.py) or an object store (cache/url.py).

It maps keys, such as "shards/00000.json", to bytes. Writes are atomic, even after a kill or a power cut, and durable
when `write` returns.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TypeVar

from zarr.abc.store import Store as ZarrStore

_T = TypeVar("_T")
TEMPORARY = ".tmp"  # extension of local files that are being written; a kill leaves nothing else behind


class Store(ABC):
    """Made by `open_store`. Small, and cheap to reopen in another process from its `location`."""

    location: str

    @abstractmethod
    def read(self, key: str) -> bytes:
        """FileNotFoundError if there is no such file; UserError if it cannot be read."""

    @abstractmethod
    def read_many(self, keys: Iterable[str]) -> dict[str, bytes]:
        """Read the files that exist."""

    @abstractmethod
    def write(self, key: str, data: bytes | memoryview) -> None:
        """Write `data` to `key`, durably. A reader sees the old file or the new one, never a part.

        UserError if it cannot be written.
        """

    @abstractmethod
    def exists(self, key: str) -> bool:
        pass

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete a file; a missing file is not an error."""

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
    def holder(self) -> str:
        """Identifies the current or last holder of the lock; empty if there was none."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Free space; None if unknown."""

    @abstractmethod
    def as_zarr(self, prefix: str) -> ZarrStore:
        """What is below `prefix`, for Zarr to read parts of files, within `attempt`."""

    @abstractmethod
    def attempt(self, verb: str, key: str, action: Callable[[], _T]) -> _T:
        """Run `action`, which does `verb` ("read", ...) to `key`, and return its result; errors become UserError.

        Network stores retry for 30 s.
        """

    def show(self, key: str) -> str:
        """The file's path or URL, for messages."""
        return f"{self.location}/{key}"
