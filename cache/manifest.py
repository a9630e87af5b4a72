"""The manifest: what a cache was made from (settings and their fingerprint), and the shapes of its arrays."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, PositiveInt, ValidationError

from cache.base import Store
from cache.layout import IMAGE_IDS, MANIFEST, ArraySpec, copy_key
from cache.sealed import FileDigest, seal, sha256, to_json, unseal
from configs.errors import UserError

FORMAT = 5
READABLE = (4, FORMAT)  # format 4 does not say which K-means made its labels


def fingerprint(settings: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of the settings as JSON with sorted keys and no spaces."""
    return sha256(json.dumps(_plain(settings), sort_keys=True, separators=(",", ":")).encode())


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings after a round trip through JSON: tuples become lists, keys strings. NaN raises ValueError."""
    return dict(json.loads(to_json(settings)))


def different_settings(
    made: Mapping[str, Any], asked: Mapping[str, Any], ours: str = "cache", free: Collection[str] = ()
) -> list[str]:
    """One line per setting that differs, such as "pseudo_labels.lambda: cache 0.8, asked 0.7", sorted by name.

    `ours` names the thing that was made with the settings `made`; settings in `free` may differ.

    Values are compared as JSON text, as the fingerprint does: 1, 1.0 and true are three values, a tuple is a list.
    """
    old, new = flat_settings(made), flat_settings(asked)
    names = sorted(name for name in (old.keys() | new.keys()) - set(free) if old.get(name) != new.get(name))
    return [f"{name}: {ours} {short(old.get(name))}, asked {short(new.get(name))}" for name in names]


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as {"outer.inner": JSON text}, for comparison."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flat_settings(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, sort_keys=True)
    return flat


def short(text: str | None) -> str:
    """Shorten long values, such as a list of 171 class names, for messages."""
    if text is None:
        return "nothing"
    return text if len(text) <= 60 else text[:60] + "..."


class Borrowed(BaseModel, frozen=True, extra="forbid"):
    """Another cache that holds an array of this one; it has the same images and shard size."""

    cache: str  # a path relative to this cache, an absolute path, or a URL
    fingerprint: str


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """The content of manifest.json. It contains no time and no host name: the same settings give the same bytes."""

    format: int
    fingerprint: str  # of `settings`
    settings: dict[str, Any]  # the resolved settings that determine the content, nested, as plain JSON
    context: dict[str, Any] = {}  # settings that do not affect the content, kept for later stages
    versions: dict[str, str]  # of the libraries that made the cache; only for people
    images: PositiveInt  # N
    views: PositiveInt  # V; may grow, so it is not part of the fingerprint
    shard_images: PositiveInt  # S
    kmeans: str | None = None  # that made the labels, "faiss" or "torch"; None in format 4
    arrays: dict[str, ArraySpec]  # stored in this cache
    borrowed: dict[str, Borrowed] = {}  # stored in another cache, by name
    files: dict[str, FileDigest] = {}  # of every file except manifests, records and shards, by key
    skipped: dict[str, str] = {}  # images skipped in any shard, and why, once every shard is done (cache/record.py)

    @classmethod
    def describe(
        cls,
        settings: Mapping[str, Any],
        versions: Mapping[str, str],
        image_ids: Sequence[str],
        views: int,
        shard_images: int,
        arrays: Mapping[str, ArraySpec],
        context: Mapping[str, Any] | None = None,
        borrowed: Mapping[str, Borrowed] | None = None,
        kmeans: str | None = None,
    ) -> "Manifest":
        """The manifest to pass to `create_cache`, which adds the digests of its `files`."""
        return cls(
            format=FORMAT,
            fingerprint=fingerprint(settings),
            settings=_plain(settings),
            context=_plain(context or {}),
            versions=dict(versions),
            images=len(image_ids),
            views=views,
            shard_images=shard_images,
            kmeans=kmeans,
            arrays=dict(arrays),
            borrowed=dict(borrowed or {}),
        )

    @classmethod
    def load(cls, store: Store) -> "Manifest":
        """The manifest of the cache in `store`; UserError if there is none, or it is damaged or of another format."""
        try:
            data = store.read(MANIFEST)
        except FileNotFoundError:
            if store.exists(copy_key(MANIFEST)):
                cure = "run cache repair, or precompute with the same settings again: both restore it"
                raise UserError(f"{store.show(MANIFEST)} is missing: {cure}") from None
            raise UserError(
                f"no cache at {store.location}, it has no {MANIFEST}: run precompute first, or point --cache at an "
                "existing one"
            ) from None
        return cls.parse(data, store.show(MANIFEST), f"delete {store.location} and run precompute again")

    @classmethod
    def parse(cls, data: bytes, path: str, afresh: str) -> "Manifest":
        """The manifest from its file's bytes; UserError, as in `load`.

        Args:
            path: where the bytes come from, for messages.
            afresh: the remedy for a manifest of another format.
        """
        cure = "run cache repair, it restores this file from its copy"
        try:
            content = json.loads(data)
            number = content.get("format") if isinstance(content, dict) else FORMAT
            if number not in READABLE and ("checksum" not in content or unseal(data)):
                raise UserError(
                    f"{path} has format {number!r}, but this version of CLIP-ZSS reads {READABLE[0]} and {FORMAT}: "
                    f"{afresh}"
                )
            manifest = cls.model_validate(unseal(data))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UserError(f"{path} is damaged ({where}: {first['msg']}): {cure}") from error
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}): {cure}") from error
        if manifest.fingerprint != fingerprint(manifest.settings):
            raise UserError(f"{path} was edited: its fingerprint does not match its settings: {cure}")
        return manifest

    def to_bytes(self) -> bytes:
        """The content of its file; for format 4, exactly the bytes that were read."""
        return seal(self.model_dump(mode="json", exclude={"kmeans"} if self.kmeans is None else None))

    @property
    def shards(self) -> int:
        """Number of shards for the N images; the last one may be short."""
        return -(-self.images // self.shard_images)

    def shard_rows(self, index: int) -> tuple[int, int]:
        """First row of shard `index` and the row after its last; IndexError if there is no such shard."""
        if not 0 <= index < self.shards:
            raise IndexError(f"shard {index} of {self.shards}")
        return index * self.shard_images, min((index + 1) * self.shard_images, self.images)

    def array_views(self, name: str, views: int | None = None) -> int:
        """Number of views in array `name` when `views` are done; by default, all."""
        return self.arrays[name].stored_views(self.views if views is None else views)

    def shard_shape(self, name: str, index: int) -> tuple[int, ...]:
        """(rows of the shard, *tail): one view of array `name`."""
        start, stop = self.shard_rows(index)
        return (stop - start, *self.arrays[name].tail)


def check_settings(location: str | Path, manifest: Manifest, asked: Mapping[str, Any]) -> None:
    """UserError that lists each differing setting, unless the cache was made with the settings `asked`."""
    if manifest.fingerprint != fingerprint(asked):
        lines = "; ".join(different_settings(manifest.settings, asked))
        cure = "choose another --cache, or delete this one"
        raise UserError(f"{location} was made with other settings ({lines}): {cure}")


def check_same_contents(location: str, stored: Manifest, asked: Manifest) -> None:
    """UserError unless both manifests have the same images and arrays; equal settings do not guarantee this."""
    contents = {"images", "shard_images", "arrays", "borrowed"}
    old, new = (manifest.model_dump(mode="json", include=contents) for manifest in (stored, asked))
    old["image_ids_sha256"], new["image_ids_sha256"] = (m.files[IMAGE_IDS].sha256 for m in (stored, asked))
    if old != new:
        lines = "; ".join(different_settings(old, new))
        raise UserError(f"{location} was made with the same settings but other data ({lines}): choose another --cache")
