"""A small dataset on disk, for the tests that read one."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from configs.dataset import Dataset, Split
from pipeline.data.dataset import SegmentationDataset
from tests.pipeline.draws import draw_classes
from tests.reference import Array

CLASSES = ("sky", "cat", "tree", "road", "cow")
UNSEEN = ("cow", "cat")
AMONG_SEEN = {0: 0, 2: 1, 3: 2}  # index among all classes -> index among the seen ones


def draw_pair(rng: np.random.Generator, height: int, width: int, none: float = 0.2) -> tuple[Array, Array]:
    """Random image and mask of all classes; a share `none` of the mask is 255."""
    image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    return image, draw_classes(rng, (height, width), none, len(CLASSES))


class Tree:
    """images/ID.png, masks/ID.png and, where asked for, list.txt below `root`."""

    def __init__(self, data_root: Path) -> None:
        self.data_root, self.root = data_root, data_root / "tiny"
        for folder in ("images", "masks"):
            (self.root / folder).mkdir(parents=True)

    def image_path(self, image_id: str) -> Path:
        return self.root / "images" / f"{image_id}.png"

    def mask_path(self, image_id: str) -> Path:
        return self.root / "masks" / f"{image_id}.png"

    def add(self, image_id: str, image: Array | Image.Image, mask: Array | Image.Image, **options: Any) -> None:
        """Pillow images go as they are, arrays as RGB and 8-bit grey; `options` are for saving the image."""
        shown = image if isinstance(image, Image.Image) else Image.fromarray(image)
        shown.save(self.image_path(image_id), **options)
        (mask if isinstance(mask, Image.Image) else Image.fromarray(mask)).save(self.mask_path(image_id))

    def fill(self, rng: np.random.Generator, count: int, height: int, width: int) -> list[tuple[Array, Array]]:
        """`count` random pairs, named 0, 1, ..."""
        pairs = [draw_pair(rng, height, width) for _ in range(count)]
        for index, pair in enumerate(pairs):
            self.add(str(index), *pair)
        return pairs

    def write(self, name: str, content: str = "") -> Path:
        """A text file below `root`."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return path

    def config(self, split: dict[str, Any] | None = None, **changes: Any) -> Dataset:
        files = Split(**{"images": "images/{id}.png", "masks": "masks/{id}.png"} | (split or {}))
        settings = {"name": "tiny", "root": "tiny", "splits": {"train": files}, "classes": CLASSES, "unseen": UNSEEN}
        return Dataset(**settings | changes)

    def read(self, split: dict[str, Any] | None = None, **changes: Any) -> SegmentationDataset:
        return SegmentationDataset(self.config(split, **changes), self.data_root, "train")
