"""Reading photos of common formats."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from configs.errors import UserError
from pipeline.data.files import files_in, is_picture, opened, rgb


def find_photos(paths: Iterable[Path], passed_over: list[str] | None = None) -> list[Path]:
    """The given files, and the photos in the given folders, recognised by extension and sorted per folder.

    Each real file is returned once. Hidden files and files written by `predict` are excluded; other files, subfolders
    and links to photos that are listed already are added to `passed_over`.

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
            passed_over += [str(below) for below in path.iterdir() if below.is_dir() and not below.name.startswith(".")]
            if not inside:
                raise UserError(f"{path} contains no readable photo: choose a folder of JPEG or PNG files, say")
        elif os.path.lexists(path):
            inside = [path]
        else:
            raise UserError(f"{path}: no such photo or folder of photos")
        for file in inside:
            if found.setdefault(os.path.realpath(file), file) != file:
                passed_over.append(str(file))
    return list(found.values())


def read_photo(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB, converted by `rgb`. BrokenFile if it cannot be read."""
    with opened(path, "photo") as picture:
        return rgb(picture, f"photo {path}")
