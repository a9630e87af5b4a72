"""Generates the masks of Pascal Context's 59 classes from trainval_merged.json.

That file belongs to the Detail API ("PASCAL in Detail"). This module relies on the following sources:

- zhanghang1989/detail-api, PythonAPI/detail/__init__.py (`__createIndex`, `getMask`, `getImgs`): the keys; images of
  phase train, val or test; a mask starts at 0, and the annotations are painted in the file's order, later ones over
  earlier ones. Its `decodeMask` takes compressed RLE alone: the file has neither polygons nor lists of runs.
- the same, PythonAPI/ipynb/detailDemoEvalCls.ipynb: prints id and name of the file's 59 categories. The ids are those
  of the 459-class list (shelhamer/fcn.berkeleyvision.org, data/pascal-context/classes-400.txt), whose 397 is "table".
- open-mmlab/mmsegmentation, tools/convert_datasets/pascal_context.py: class k is the k-th smallest of these ids, 0 is
  no class, and PNGs are named after `file_name`. That makes 4996 images in train and 5104 in val
  (zhanghang1989/PyTorch-Encoding, issue 155), and 0, 55 and 58 in 2008_000002 (mmsegmentation, issue 1940): tvmonitor
  and window.
"""

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from configs.errors import UserError

SOURCE, MASKS, LISTS = "trainval_merged.json", "SegmentationClassContext", "ImageSets/SegmentationContext"
PHASES = ("train", "val")

# Category id -> name, in the order of the classes: a mask holds 1 where this says aeroplane, 59 where it says wood.
CATEGORIES = {
    2: "aeroplane", 9: "bag", 18: "bed", 19: "bedclothes", 22: "bench", 23: "bicycle", 25: "bird", 31: "boat",
    33: "book", 34: "bottle", 44: "building", 45: "bus", 46: "cabinet", 59: "car", 65: "cat", 68: "ceiling",
    72: "chair", 80: "cloth", 85: "computer", 98: "cow", 104: "cup", 105: "curtain", 113: "dog", 115: "door",
    144: "fence", 158: "floor", 159: "flower", 162: "food", 187: "grass", 189: "ground", 207: "horse",
    220: "keyboard", 232: "light", 258: "motorbike", 259: "mountain", 260: "mouse", 284: "person", 295: "plate",
    296: "platform", 308: "pottedplant", 324: "road", 326: "rock", 347: "sheep", 349: "shelves", 354: "sidewalk",
    355: "sign", 360: "sky", 366: "snow", 368: "sofa", 397: "diningtable", 415: "track", 416: "train", 420: "tree",
    424: "truck", 427: "tvmonitor", 440: "wall", 445: "water", 454: "window", 458: "wood",
}  # fmt: skip
_LABELS = {category: label for label, category in enumerate(CATEGORIES, start=1)}
_SYNONYMS = {"diningtable": "table"}

# Six bits a character from "0" on; the upper half says that the number goes on, so no text ends with it.
_COUNTS = re.compile("[0-o]*[0-O]")


def write_context_masks(root: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Write `root`/SegmentationClassContext/ID.png (8-bit), and the id lists of train and val if they are missing.

    `root` is VOCdevkit/VOC2010. Pixels without one of the 59 classes are 0. An existing folder of masks is not changed.
    A new one is complete when it appears, after the lists, so a kill leaves no incomplete dataset.
    """
    masks, source = root / MASKS, root / SOURCE
    if masks.exists():
        return  # its lists came with it, from wherever the masks are
    if not source.is_file():
        raise UserError(f"{root} has neither {MASKS} nor {SOURCE}: put {SOURCE} of PASCAL in Detail there")
    images, annotations = _read(source)
    with tempfile.TemporaryDirectory(prefix=f".{MASKS}-", dir=root) as aside:
        folder = Path(aside) / MASKS
        folder.mkdir()
        for done, (image, (name, _, *size)) in enumerate(images.items(), start=1):
            painted = _paint(source, size, annotations[image])
            Image.fromarray(painted).save(folder / f"{name}.png", compress_level=1)
            if progress:
                progress(done, len(images))
        for phase in PHASES:
            listing = root / LISTS / f"{phase}.txt"
            if not listing.exists():
                draft = Path(aside) / listing.name
                listed = [name for name, of, *_ in sorted(images.values()) if of == phase]
                draft.write_text("".join(f"{name}\n" for name in listed), encoding="utf-8")
                listing.parent.mkdir(parents=True, exist_ok=True)
                draft.replace(listing)
        try:
            folder.rename(masks)
        except OSError:
            if not masks.exists():  # otherwise another process was first, with the same files
                raise


_Images = dict[int, tuple[str, str, int, int]]  # image id -> name, phase, height, width
_Annotations = dict[int, list[tuple[str, int, dict[str, Any]]]]  # image id -> where it stands, label, segmentation


def _read(source: Path) -> tuple[_Images, _Annotations]:
    """The images of train and val, and the annotations of each in the file's order."""
    try:
        with source.open(encoding="utf-8") as stream:
            content = json.load(stream)
    except (OSError, ValueError) as error:  # ValueError: neither JSON nor UTF-8
        raise UserError(f"cannot read {source}: {error}; download it again") from error

    names = {}
    for where, record in _records(source, content, "categories"):
        names[_field(source, where, record, "category_id", int)] = _field(source, where, record, "name", str)
    for category, name in CATEGORIES.items():
        found = names.get(category)
        if found not in (name, _SYNONYMS.get(name, name)):
            raise UserError(f"{source}: category {category} is {found}, not {name}; download the original file")

    images: _Images = {}
    others, taken = set(), set()
    for where, record in _records(source, content, "images"):
        image = _field(source, where, record, "image_id", int)
        phase = _field(source, where, record, "phase", str)
        if phase not in PHASES:
            others.add(image)
            continue
        name = Path(_field(source, where, record, "file_name", str)).stem
        height, width = (_field(source, where, record, side, int) for side in ("height", "width"))
        if image in images or not name or name in taken or min(height, width) < 1:
            raise _damaged(source, where, "repeats an image, or has no size or name")
        images[image] = name, phase, height, width
        taken.add(name)

    annotations: _Annotations = defaultdict(list)
    for where, record in _records(source, content, "annos_segmentation"):
        image = _field(source, where, record, "image_id", int)
        label = _LABELS.get(_field(source, where, record, "category_id", int), 0)
        segmentation = _field(source, where, record, "segmentation", dict)
        if image in images:
            annotations[image].append((where, label, segmentation))
        elif image not in others:
            raise _damaged(source, where, f"is of image {image}, which is not in the file")
    return images, annotations


def _paint(source: Path, size: list[int], annotations: list[tuple[str, int, dict[str, Any]]]) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    for where, label, segmentation in annotations:
        if _field(source, where, segmentation, "size", list) != size:
            raise _damaged(source, where, f"has size {segmentation['size']}, its image {size} (height, width)")
        if not _COUNTS.fullmatch(_field(source, where, segmentation, "counts", str)):
            raise _damaged(source, where, "has counts that are no compressed RLE")
        pixels = _decode(segmentation)
        # Pixels that no run reaches hold whatever was in memory. Only runs that would be too long for one pixel less
        # reach them all.
        if pixels is None or _decode({**segmentation, "size": [mask.size - 1, 1]}) is not None:
            raise _damaged(source, where, f"has runs that do not add up to {mask.size} pixels")
        mask[pixels.view(bool)] = label
    return mask


def _decode(segmentation: dict[str, Any]) -> np.ndarray | None:
    """The pixels (height, width), 1 or 0; none where the runs are too long."""
    try:
        pixels: np.ndarray = rle.decode(segmentation)
    except ValueError:
        return None
    return pixels


def _records(source: Path, content: Any, key: str) -> list[tuple[str, Any]]:
    listed = _field(source, "its outermost level", content, key, list)
    return [(f"{key}[{index}]", record) for index, record in enumerate(listed)]


def _field(source: Path, where: str, record: Any, key: str, kind: type) -> Any:
    if not isinstance(record, dict) or not isinstance(record.get(key), kind):
        raise _damaged(source, where, f"has no {key} of type {kind.__name__}")
    return record[key]


def _damaged(source: Path, where: str, what: str) -> UserError:
    return UserError(f"{source}: {where} {what}; download the file again")
