"""Digests of files, and JSON files with a checksum of their own content.

Neither contains a time or a host name: the same content always gives the same bytes.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, NonNegativeInt


def sha256(data: Any) -> str:
    """Hex digest of anything that is one block of bytes: bytes, or an array in C order."""
    return hashlib.sha256(data).hexdigest()


class FileDigest(BaseModel, frozen=True, extra="forbid"):
    """Size and SHA-256 of a file."""

    bytes: NonNegativeInt
    sha256: str

    @classmethod
    def of(cls, data: Any) -> "FileDigest":
        return cls(bytes=memoryview(data).nbytes, sha256=sha256(data))


def to_json(value: Any) -> bytes:
    """Indented JSON with sorted keys: equal values give equal bytes. NaN and infinity raise ValueError."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def seal(content: Mapping[str, Any]) -> bytes:
    """The content as JSON, with the SHA-256 of that JSON added under "checksum"."""
    return to_json({**content, "checksum": sha256(to_json(content))})


def unseal(data: bytes) -> dict[str, Any]:
    """The content that was sealed; ValueError if a single bit of `data` is another, be it only white space."""
    content = json.loads(data)
    if not isinstance(content, dict):
        raise ValueError("not an object")
    content.pop("checksum", None)
    if seal(content) != data:
        raise ValueError("the checksum does not fit the content")
    return content
