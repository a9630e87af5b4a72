"""Photos of any kind, as people have them."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from configs.errors import UserError
from pipeline.data.files import files_in, is_picture, opened, rgb


def find_photos(paths: Iterable[Path], passed_over: list[str] | None = None) -> list[Path]:
    """The files named, and those in the folders named that look like photos, by their ending; each real file once.

    Sorted in a folder. What `predict` writes is none; other files, and links to photos, go to `passed_over`.

    Raises:
        UserError: a path does not exist, or a folder holds no image.
    """
    found: dict[str, Path] = {}
    passed_over = [] if passed_over is None else passed_over
    for path in paths:
        if path.is_dir():
            files = sorted(files_in(str(path), False, passed_over))
            inside = [Path(file) for file in files if is_picture(file)]
            passed_over += [file for file in files if not is_picture(file)]
            if not inside:
                raise UserError(f"{path} holds no photo that can be read: name a folder of JPEG or PNG files, say")
        elif os.path.lexists(path):
            inside = [path]
        else:
            raise UserError(f"{path}: no such photo, or folder of photos")
        for file in inside:
            found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def read_photo(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB, as `rgb` has it. BrokenFile if it cannot be."""
    with opened(path, "photo") as picture:
        return rgb(picture, f"photo {path}")
