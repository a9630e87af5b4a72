"""Files that are whole or absent, even after a kill or a power cut, and the same bytes for the same content."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from configs.errors import UserError


def sha256(data: Any) -> str:
    """Hex digest of anything that is one block of bytes: bytes, or an array in C order."""
    return hashlib.sha256(data).hexdigest()


def to_json(value: Any) -> bytes:
    """Indented JSON with sorted keys: equal values give equal bytes. NaN and infinity raise ValueError."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def read_json(path: Path, cure: str) -> Any:
    """The JSON value in `path`; UserError, ending in `cure`, if the file is missing or is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {cure}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {cure}") from error


def temporary(path: Path) -> Path:
    """Where `write_atomically` collects the bytes of `path`; all that a kill can leave behind."""
    return path.with_name(path.name + ".tmp")


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Puts `data` at `path`, on disk when this returns; a reader sees the old file or the new one, never a part."""
    write_durably(temporary(path), data)
    move_durably(temporary(path), path)


def write_durably(path: Path, data: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def move_durably(source: Path, target: Path) -> None:
    os.replace(source, target)
    sync_directory(target.parent)


def make_directory(path: Path) -> None:
    """Creates `path` and its parents where they are missing, on disk when this returns."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """A file's name is its directory's content: it survives a power cut only once the directory is flushed too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
