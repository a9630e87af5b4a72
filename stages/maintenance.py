"""Care of caches: what they hold, whether every byte is as it was written, and how to mend what is not."""

from pathlib import Path

from cache.verify import Damage, info, prepare_repair
from configs.load import resolve
from stages.caches import cached_settings
from stages.precompute import precompute


def repair(location: str, data_root: Path, device: str) -> list[Damage]:
    """Restores small files from their copies and recomputes bad shards, and those that were never computed.

    Returns:
        What was damaged.

    Raises:
        UserError: there is no cache, both copies of a small file are lost, or the dataset is another by now.
    """
    found = prepare_repair(location)
    precompute(resolve(base=cached_settings(info(location).manifest)), data_root, location, device)
    return found
