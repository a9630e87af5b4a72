"""Repairs damaged caches."""

from pathlib import Path

from cache.dense import DENSE_TOKENS
from cache.reader import open_cache
from cache.store import place_of
from cache.verify import Damage, info, prepare_repair
from configs.errors import UserError
from configs.load import resolve
from stages.common.caches import cached_settings
from stages.precompute.recluster import recluster
from stages.precompute.stage import precompute


def repair(location: str, data_root: Path, device: str, lender: str | None = None) -> list[Damage]:
    """Restore small files from their copies and recompute bad and missing shards.

    Labels that were computed from another cache's tokens are recomputed from them, without the teacher.

    Args:
        lender: new location of the cache that this one shares tokens with; by default, it has not moved.

    Returns:
        What was damaged.

    Raises:
        UserError: there is no cache, both copies of a small file are lost, or the dataset has changed.
    """
    found = prepare_repair(location)
    manifest = info(location).manifest
    config = resolve(base=cached_settings(manifest), base_name=f"cache {location}")
    if manifest.borrowed:
        place = lender or place_of(manifest.borrowed[DENSE_TOKENS].cache, location)
        try:
            source = open_cache(place)
        except UserError as error:
            raise UserError(f"{error}; if {place} was moved, pass its new location as --lender") from error
        recluster(config, source, location)
    else:
        precompute(config, data_root, location, device)
    return found
