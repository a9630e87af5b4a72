"""Small files are kept twice: a damaged one is restored from the other.

`copies/<key>` is a copy of `<key>`, for the manifest and for every file whose digest the manifest holds.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cache.base import Store
from cache.layout import MANIFEST, copy_key
from cache.manifest import Manifest
from cache.sealed import FileDigest
from configs.errors import UserError


def trusted_manifest(store: Store) -> Manifest:
    """The manifest, or its copy if the manifest is missing or damaged; UserError if both are."""
    try:
        return Manifest.load(store)
    except UserError as error:
        try:
            return Manifest.parse(store.read(copy_key(MANIFEST)), store.show(copy_key(MANIFEST)), "")
        except (FileNotFoundError, UserError):
            raise error from None


@dataclass(frozen=True)
class SmallFile:
    """One of the two copies of a small file; `data` is its content."""

    key: str
    digest: FileDigest
    data: bytes | None

    @property
    def is_good(self) -> bool:
        return self.data is not None and FileDigest.of(self.data) == self.digest


def small_files(store: Store, manifest: Manifest) -> list[tuple[SmallFile, SmallFile]]:
    """Every small file and its copy, the manifest's last."""
    return file_pairs(store, {**manifest.files, MANIFEST: FileDigest.of(manifest.to_bytes())})


def file_pairs(store: Store, digests: Mapping[str, FileDigest]) -> list[tuple[SmallFile, SmallFile]]:
    """These small files, by key what each must be, and their copies."""
    found = store.read_many([*digests, *map(copy_key, digests)])
    return [
        (SmallFile(key, digest, found.get(key)), SmallFile(copy_key(key), digest, found.get(copy_key(key))))
        for key, digest in digests.items()
    ]


def restore(store: Store, manifest: Manifest, made: Mapping[str, bytes] | None = None) -> list[str]:
    """Rewrites every small file that is missing or damaged, from its copy or else from `made`, and copies likewise.

    Args:
        manifest: a trusted one.
        made: key -> bytes as they would be computed now; ignored if they do not match the manifest.

    Returns:
        Keys for which neither copy nor `made` has the right bytes.
    """
    sources = {**(made or {}), MANIFEST: manifest.to_bytes()}
    lost = []
    for pair in small_files(store, manifest):
        key, digest = pair[0].key, pair[0].digest
        good = next((file.data for file in pair if file.is_good), sources.get(key))
        if good is None or FileDigest.of(good) != digest:
            lost.append(key)
            continue
        for file in pair:
            if not file.is_good:
                store.write(file.key, good)
    return lost
