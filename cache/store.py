"""Opens the location of a cache: a local folder, or any fsspec URL (s3://, gs://, memory://)."""

import os
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
    """The location for processes with another working directory."""
    return str(location) if "://" in str(location) else str(Path(location).absolute())


def name_for(location: str | Path, folder: str | Path) -> str:
    """The location as stored in a file in `folder`: relative if both share a parent folder, which may be moved."""
    place, home = absolute(location), absolute(folder)
    if "://" in place + home or os.path.commonpath([place, home]) == Path(place).anchor:
        return place
    return Path(os.path.relpath(place, home)).as_posix()


def place_of(name: str, folder: str | Path) -> str:
    """The inverse of `name_for`."""
    return name if "://" in name or os.path.isabs(name) else os.path.normpath(os.path.join(folder, name))
