"""Opens the location of a cache: a local folder, or any fsspec URL (s3://, gs://, memory://)."""

from pathlib import Path

from cache.base import Store
from cache.folder import FolderStore
from cache.url import UrlStore


def open_store(location: str | Path) -> Store:
    """The store at a path or URL, which need not exist yet; UserError if the location is invalid."""
    text = str(location)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    return UrlStore(text) if "://" in text else FolderStore(Path(text))


def absolute(location: str | Path) -> str:
    """The location as another process, with another working directory, can open it."""
    return str(location) if "://" in str(location) else str(Path(location).absolute())
