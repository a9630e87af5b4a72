"""What a cache was made from: the settings, their fingerprint, and the shape of what follows."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, PositiveInt, ValidationError

from cache.files import read_json, sha256, to_json
from cache.layout import ArraySpec, manifest_path
from configs.errors import UserError

FORMAT = 2


def fingerprint(settings: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of the settings as JSON with sorted keys and no spaces."""
    return sha256(json.dumps(_plain(settings), sort_keys=True, separators=(",", ":")).encode())


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as a reload from JSON gives them: tuples are lists, keys are strings. NaN raises ValueError."""
    return dict(json.loads(to_json(settings)))


def different_settings(cache: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """One line per setting that differs, such as "pseudo_labels.lambda: cache 0.8, asked 0.7", sorted by name.

    Values are compared as JSON text, as the fingerprint does: 1, 1.0 and true are three values, a tuple is a list.
    """
    ours, theirs = _flat(cache), _flat(asked)
    names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    return [f"{name}: cache {_short(ours.get(name))}, asked {_short(theirs.get(name))}" for name in names]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as {"outer.inner": JSON text}."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, sort_keys=True)
    return flat


def _short(text: str | None) -> str:
    """A list of 171 class names would bury the line that it stands in."""
    if text is None:
        return "nothing"
    return text if len(text) <= 60 else text[:60] + "..."


class ArrayDigest(BaseModel, frozen=True, extra="forbid"):
    """What must be equal for two arrays to be the same: `sha256` is of the values' bytes in C order."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str

    @classmethod
    def of(cls, array: np.ndarray) -> "ArrayDigest":
        return cls(shape=array.shape, dtype=str(array.dtype), sha256=sha256(np.ascontiguousarray(array)))


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """The content of manifest.json. Holds no time and no host, so the same settings give the same bytes."""

    format: int
    fingerprint: str  # of `settings`
    settings: dict[str, Any]  # stage one's resolved settings, nested, as plain JSON: all that decides what is stored
    context: dict[str, Any] = {}  # settings that decide none of it, kept for the stages that follow
    versions: dict[str, str]  # of the libraries that made the cache; for the reader's eyes, compared with nothing
    images: PositiveInt  # N
    views: PositiveInt  # V
    shard_images: PositiveInt  # S
    arrays: dict[str, ArraySpec]
    image_ids_sha256: str  # of the file image_ids.json
    text_features: ArrayDigest
    skipped: dict[str, str] = {}  # of all completion records, once every shard is done (cache/record.py)

    @classmethod
    def describe(
        cls,
        settings: Mapping[str, Any],
        versions: Mapping[str, str],
        image_ids: Sequence[str],
        views: int,
        shard_images: int,
        arrays: Mapping[str, ArraySpec],
        text_features: np.ndarray,
        context: Mapping[str, Any] | None = None,
    ) -> "Manifest":
        return cls(
            format=FORMAT,
            fingerprint=fingerprint(settings),
            settings=_plain(settings),
            context=_plain(context or {}),
            versions=dict(versions),
            images=len(image_ids),
            views=views,
            shard_images=shard_images,
            arrays=dict(arrays),
            image_ids_sha256=sha256(to_json(list(image_ids))),
            text_features=ArrayDigest.of(text_features),
        )

    @classmethod
    def load(cls, cache: Path) -> "Manifest":
        """The manifest of the cache at `cache`; UserError if there is none, or it is damaged or of another format."""
        if not cache.is_dir():
            raise UserError(f"no cache at {cache}: run precompute first, or point --cache at an existing one")
        path = manifest_path(cache)
        if not path.exists():
            raise UserError(f"{cache} is not a cache, it has no manifest.json: run precompute, or check --cache")
        cure = f"delete {cache} and run precompute again"
        content = read_json(path, cure)
        number = content.get("format") if isinstance(content, dict) else None
        if number != FORMAT:
            raise UserError(f"{path} has format {number!r}, this version of CLIP-ZSS reads format {FORMAT}: {cure}")
        try:
            manifest = cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UserError(f"{path} is damaged ({where}: {first['msg']}): {cure}") from error
        if manifest.fingerprint != fingerprint(manifest.settings):
            raise UserError(f"{path} was edited, its fingerprint does not fit its settings: undo that, or {cure}")
        return manifest

    def to_bytes(self) -> bytes:
        return to_json(self.model_dump(mode="json"))

    @property
    def shards(self) -> int:
        """How many shards the N images fill; the last may be short."""
        return -(-self.images // self.shard_images)

    def shard_rows(self, index: int) -> tuple[int, int]:
        """First row of shard `index` and the row after its last; IndexError if there is no such shard."""
        if not 0 <= index < self.shards:
            raise IndexError(f"shard {index} of {self.shards}")
        return index * self.shard_images, min((index + 1) * self.shard_images, self.images)

    def shard_shape(self, name: str, index: int) -> tuple[int, ...]:
        """(rows of the shard, V, *tail) of array `name`."""
        start, stop = self.shard_rows(index)
        return (stop - start, self.views, *self.arrays[name].tail)


def check_settings(cache: Path, manifest: Manifest, asked: Mapping[str, Any]) -> None:
    """UserError, naming each setting that differs, unless the cache at `cache` was made from the settings `asked`."""
    if manifest.fingerprint != fingerprint(asked):
        lines = "; ".join(different_settings(manifest.settings, asked))
        raise UserError(f"{cache} was made from other settings ({lines}): choose another --cache, or delete this one")
