"""The gallery's folder: a static page, an index of all views, and a picture and a script of data for each view.

A page from file:// may load scripts, but not read files, so all data are scripts that call a function of the page.
"""

import base64
import json
import math
import shutil
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from configs.errors import UserError, writing
from configs.schema import Config
from pipeline.data.dataset import IGNORE
from stages.inspect.gallery.collect import Regions, View

PAGE, INDEX, VIEWS = "index.html", "gallery-index.js", "views"
PARTS = ("page.css", "labels.js", "charts.js", "draw.js", "note.js", "page.js")
PICTURE_SIDE, MASK_SIDE, JPEG_QUALITY = 384, 128, 85
BINS = 100  # of the similarities, from -1 to 1


def check_folder(folder: Path) -> None:
    """UserError unless the folder is new, empty, or a gallery, which a new one may replace."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file: name a folder for the gallery, or use --png for a picture")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / INDEX).is_file():
        raise UserError(f"--output {folder} holds other files: name a new folder, or empty this one")


def write_gallery(config: Config, location: str, views: Iterable[View], folder: Path) -> Path:
    """Writes the page about the cache at `location`, and returns its path. Views are taken one at a time.

    An existing gallery is kept until the new one is complete.
    """
    check_folder(folder)
    beside = folder.resolve()  # `.` has no name
    aside = beside.with_name(f".{beside.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _write(config, location, views, aside)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.move(aside / INDEX, folder / INDEX)  # first, so that the folder counts as a gallery after a kill
        shutil.rmtree(folder / VIEWS, ignore_errors=True)
        for name in (VIEWS, *PARTS, PAGE):  # other files in the folder stay
            shutil.move(aside / name, folder / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder / PAGE


def _write(config: Config, location: str, views: Iterable[View], folder: Path) -> None:
    (folder / VIEWS).mkdir(parents=True)
    table, histogram, fusable, differing = [], np.zeros(BINS, np.int64), 0, 0
    hidden = [config.dataset.classes.index(name) for name in config.dataset.unseen]
    for number, view in enumerate(views):
        picture = Image.fromarray(view.picture)
        picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        with writing(folder / VIEWS / f"{number}.jpg"):
            picture.save(folder / VIEWS / f"{number}.jpg", quality=JPEG_QUALITY)
        _put(folder / VIEWS / f"{number}.js", _call("view", number, _data(view)))
        table.append(_line(view, hidden))
        if view.regions is not None:
            fusable += 1
            differing += not view.regions.same
            pairs = view.regions.similarity[np.triu_indices(len(view.regions.lengths), 1)]
            histogram += np.histogram(pairs, BINS, (-1, 1))[0]
    index = {
        "dataset": config.dataset.name,
        "cache": location,
        "lambda": config.pseudo_labels.threshold,
        "classes": config.dataset.classes,
        "words": config.dataset.words,
        "hidden": hidden,
        "views": table,
        "similarities": histogram.tolist(),
        "fusable": fusable,
        "missing": _what_is_missing(config, len(table), fusable),
        "differing": differing,
    }
    for name in PARTS:
        _put(folder / name, _part(name))
    _put(folder / INDEX, _call("start", index))
    _put(folder / PAGE, _part("page.html"))


def _put(path: Path, text: str) -> None:
    with writing(path):
        path.write_text(text, encoding="utf-8")


def _what_is_missing(config: Config, views: int, fusable: int) -> str:
    """Why the page cannot fuse all views again, and what to do; empty if it can."""
    if fusable == views:
        return ""
    why = f"{views - fusable} views have no dense tokens in the cache"
    setting = "a higher storage.dense_views" if fusable else "--set storage.dense_tokens=float16"
    if config.pseudo_labels.kmeans == "per-scale":
        why = "With pseudo_labels.kmeans=per-scale, the tokens of a region do not tell what was fused"
        setting = "--set pseudo_labels.kmeans=joint"
    return f"{why}: for the λ slider and class names, precompute with {setting}."


def _part(name: str) -> str:
    return files("stages.inspect.gallery").joinpath("page", name).read_text(encoding="utf-8")


def _call(function: str, *values: Any) -> str:
    """A script in ASCII, whatever the names contain: JSON is a subset of JavaScript."""
    return f"gallery.{function}({', '.join(json.dumps(value, allow_nan=False) for value in values)});\n"


def _line(view: View, hidden: list[int]) -> dict[str, Any]:
    """A view's line of the index: enough to sort, filter and draw the charts."""
    row = view.row
    return {
        "id": row.image_id,
        "view": row.view,
        "regions": row.clusters,
        "groups": row.groups,
        "coverage": row.coverage,
        "purity": None if math.isnan(row.purity) else row.purity,
        "sizes": np.unique(view.groups[view.groups != IGNORE], return_counts=True)[1].tolist(),
        "hidden": hidden_classes_found(view.groups, view.truth, hidden),
    }


def hidden_classes_found(groups: np.ndarray, truth: np.ndarray, hidden: list[int]) -> list[tuple[int, int, int]]:
    """For each hidden class in the view: (class, its pseudo-labelled tokens, those in groups where it is most common).

    Ties go to the smallest class; tokens without a known class do not count.
    """
    counted = (groups != IGNORE) & (truth != IGNORE)
    table = np.zeros((256, 256), np.int64)
    np.add.at(table, (groups[counted], truth[counted]), 1)
    commonest = table.argmax(axis=1)
    return [
        (label, int(tokens), int(table[commonest == label, label].sum()))
        for label in hidden
        if (tokens := table[:, label].sum())
    ]


def _data(view: View) -> dict[str, Any]:
    """What the page needs to draw a view and to fuse its regions."""
    step = np.arange(min(len(view.mask), MASK_SIDE)) * len(view.mask) // min(len(view.mask), MASK_SIDE)
    data: dict[str, Any] = {
        "mask": _runs(view.mask[np.ix_(step, step)]),
        "truth": _runs(view.truth),
        "clusters": _runs(view.clusters),
        "groups": _runs(view.groups),
        "seeds": view.seeds,
    }
    return data if view.regions is None else data | _fusable(view.regions)


def _fusable(regions: Regions) -> dict[str, Any]:
    """Similarities above the diagonal, row by row, as doubles, so that the page makes the same decisions as Python."""
    above = regions.similarity[np.triu_indices(len(regions.lengths), 1)]
    return {
        "similarities": _base64(above.astype("<f8")),
        "lengths": _base64(regions.lengths.astype("<f8")),
        "text": _base64(np.rint(regions.text.clip(-1, 1) * 32767).astype("<i2")),
    }


def _runs(labels: np.ndarray) -> str:
    """Run lengths of square labels, row by row, in base64: alternately a label and its count, from 1 to 255."""
    flat = labels.ravel()
    starts = np.flatnonzero(np.append(True, flat[1:] != flat[:-1]))
    lengths = np.diff(np.append(starts, len(flat)))
    pieces = -(-lengths // 255)
    counts = np.full(pieces.sum(), 255)
    counts[pieces.cumsum() - 1] = lengths - 255 * (pieces - 1)
    return _base64(np.stack([flat[starts].repeat(pieces), counts], axis=1).astype(np.uint8))


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()
