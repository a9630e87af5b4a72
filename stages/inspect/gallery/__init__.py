"""A folder of HTML that shows pseudo labels, for a browser without a server or a network."""

from pathlib import Path

from cache.reader import Cache
from configs.schema import Config
from stages.common.progress import progress_bar
from stages.inspect.gallery.collect import collect
from stages.inspect.gallery.write import write_gallery


def make_gallery(config: Config, cache: Cache, data_root: Path, rows: list[int], folder: Path) -> Path:
    """Writes the gallery of the chosen images (rows of the training split); returns the path of its page.

    Raises:
        UserError: the folder holds other files, the cache does not fit, or a file is damaged.
    """
    with progress_bar("gallery", len(rows) * cache.manifest.views, "views") as advance:
        views = collect(config, cache, data_root, rows)
        return write_gallery(config, cache.location, (view for view in views if advance() is None), folder)
