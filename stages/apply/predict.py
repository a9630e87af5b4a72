"""Segments your own photos with your own words, using a trained student.

>>> from stages.apply.predict import Segmenter
>>> segmenter = Segmenter.load("runs/scenes-001")
>>> mask = segmenter("photo.jpg", ["cow|bull|calf", "grass"])  # (H, W): 0 is cow, 1 is grass
"""

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco
from torch import nn

from configs.errors import UserError, writing
from pipeline.data.files import WRITTEN, BrokenFile, rgb
from pipeline.data.masks import ignore_index
from pipeline.data.photos import find_photos, read_photo
from pipeline.data.views import normalise
from pipeline.inference import ClassLogits, Cut, short_side_to
from pipeline.learning.glm import attention
from pipeline.metrics import calibrated_argmax
from pipeline.pictures import contact_sheet, legend, lit, overlay, palette, stacked
from pipeline.teacher.teacher import Teacher, load_teacher
from stages.apply.evaluate import run_gamma
from stages.apply.predictor import Predictor, dense_predictor, student_predictor
from stages.apply.words import Vocabulary, vocabulary
from stages.common.ahead import ahead
from stages.common.devices import choose_device, lanes
from stages.common.progress import progress_bar, say
from stages.common.ranks import from_everyone, own_share
from stages.common.runs import Run, load_run

MOST_PIXELS = 2**22  # of a mask before it is enlarged: finer than the student sees
PICTURE_SIDE = 2048  # longest side of a picture for people


def best_words(logits: ClassLogits, size: tuple[int, int], words: Vocabulary, gamma: float) -> np.ndarray:
    """(H, W) indices of the words, at the photo's `size`; `ignore_index` where a class that was not asked for wins."""
    height, width = size
    scale = min(1.0, (MOST_PIXELS / (height * width)) ** 0.5)
    small = max(1, round(height * scale)), max(1, round(width * scale))
    groups = (words.seen, words.unseen) if words.seen else (words.unseen, [])
    [found] = calibrated_argmax(logits, small, *groups, [gamma])
    none = ignore_index(len(words.names))
    indices = found.where(found < len(words.names), none).cpu().numpy().astype(np.min_scalar_type(none))
    mask = Image.fromarray(indices)
    return np.asarray(mask.resize((width, height), Image.Resampling.NEAREST))


class Segmenter:
    """A trained student that segments images into any classes.

    Attributes:
        classes: the training classes, used if no words are given.
        gamma: subtracted from the logits of classes with masks in training.
    """

    def __init__(self, run: Run, gamma: float | None = None) -> None:
        """`gamma`: by default that of the run, see `run_gamma`."""
        self.run = run
        self.classes = run.config.dataset.classes
        self.gamma = run_gamma(run) if gamma is None else gamma
        self._vocabularies: dict[tuple[tuple[str, ...], bool], Vocabulary] = {}

    @classmethod
    def load(cls, run: str | Path, device: str = "auto", gamma: float | None = None) -> "Segmenter":
        """Load the student of the run in this folder. UserError if there is none."""
        return cls(load_run(Path(run), choose_device(device)), gamma)

    def __call__(
        self, image: np.ndarray | Image.Image | str | Path, classes: Sequence[str] | None = None, others: bool = False
    ) -> np.ndarray:
        """Segment one image.

        Args:
            image: (H, W, 3) uint8 RGB, a PIL image, or a file's path; the last two are converted as in `read_photo`.
            classes: K words, synonyms as in `cow|bull|calf`. CLIP's text tower encodes new ones once; their features
                are kept in caches/text/.
            others: the training classes compete too.

        Returns:
            (H, W) uint8: index into `classes` for each pixel; with `others`, 255 where none of them is the best. With
            more than 255 classes uint16, and 65535.

        Raises:
            UserError: invalid words (see `parse_words`), not an image, or new words but no text tower.
        """
        if isinstance(image, str | Path):
            image = read_photo(Path(image))
        elif isinstance(image, Image.Image):
            image = rgb(image, "the image")
        elif image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UserError(f"an image array must be (H, W, 3) uint8, RGB, not {image.shape} {image.dtype}")
        words = self.vocabulary(classes, others)
        return best_words(self.predictor(words)(image), (image.shape[0], image.shape[1]), words, self.gamma)

    def predictor(self, words: Vocabulary) -> Predictor:
        return student_predictor(self.run.student, words.features, words.config, words.class_of_channel)

    def vocabulary(self, classes: Sequence[str] | None = None, others: bool = False) -> Vocabulary:
        """The words, parsed, with their features, and with those of the training classes if `others` compete."""
        words = self.classes if classes is None else classes
        key = tuple(words), others
        if key not in self._vocabularies:
            self._vocabularies[key] = vocabulary(self.run, words, others)
        return self._vocabularies[key]


class _Photo(NamedTuple):
    """What is kept of a photo until its results are written."""

    file: Path
    size: tuple[int, int]  # (H, W)
    cut: Cut
    small: np.ndarray  # for the pictures


class _Results(NamedTuple):
    """Of a photo: masks (H, W) of the student and, where they are compared, of the teacher; attention (h, w)."""

    photo: _Photo
    mask: np.ndarray
    by_teacher: np.ndarray | None
    attention: np.ndarray | None


def predict(
    segmenter: Segmenter, photos: Sequence[Path], classes: Sequence[str] | None, output: Path,
    rle: bool = False, compare: bool = False, show_attention: bool = False, others: bool = False,
) -> tuple[int, list[str]]:  # fmt: skip
    """Writes PHOTO.overlay.png and PHOTO.mask.png (indices of the classes) of every photo to the folder `output`.

    Existing outputs of the same photo are deleted. Photos are read, and results written, while the student computes.
    With torchrun every rank takes its share of the photos.

    Args:
        photos: files, or folders of them.
        rle: also write PHOTO.rle.json, COCO's compressed run lengths of every predicted class.
        compare: also write PHOTO.compare.png, the teacher's dense prediction next to the student's. Loads CLIP.
        show_attention: also write PHOTO.attention.png, where GLM attends for the photo's CLS token. Loads CLIP.
        others: the training classes compete too; what they win is the mask's highest value, and no run length.

    Returns:
        The number of segmented photos, and the reason for each that could not be read or written, of all ranks.
    """
    files = own_share(_to_segment(photos))
    output.mkdir(parents=True, exist_ok=True)
    words = segmenter.vocabulary(classes, others)
    student, device = segmenter.predictor(words), str(segmenter.run.text_features.device)
    teacher = None
    if compare or show_attention:
        teacher, student = load_teacher(words.config.teacher, device), replace(student, lanes=1)
    by_teacher = None
    if teacher and compare:
        by_teacher = dense_predictor(teacher, words.features, words.config, words.class_of_channel)
    failures: dict[Path, str] = {}  # whatever happens to a photo, the others follow

    def ready(file: Path) -> tuple[Cut, _Photo] | None:
        try:
            for ending in WRITTEN:
                Path(f"{output / file.name}{ending}").unlink(missing_ok=True)
            photo = read_photo(file)
        except (BrokenFile, OSError) as error:
            failures[file] = _failure(file, error, output)
            return None
        shown = student.cut(photo)
        return shown, _Photo(file, (photo.shape[0], photo.shape[1]), shown, _small(photo))

    def finish(photo: _Photo, logits: ClassLogits) -> _Results:
        other = attention = None
        if by_teacher:
            other = best_words(by_teacher.logits([photo.cut])[0], photo.size, words, 0.0)
        if teacher and show_attention:
            attention = cls_attention(segmenter.run, teacher, photo.cut.image)
        return _Results(photo, best_words(logits, photo.size, words, segmenter.gamma), other, attention)

    def write(found: _Results) -> None:
        try:
            _write(found, words, output, rle)
        except OSError as error:
            failures[found.photo.file] = _failure(found.photo.file, error, output)

    writers = lanes(device).readers
    with progress_bar("predict", len(files), "photos") as advance, ThreadPoolExecutor(writers) as pool:
        for _ in ahead(pool, write, student.each(files, ready, finish), 2 * writers):
            advance()
    done = from_everyone((len(files) - len(failures), [failures[file] for file in files if file in failures]))
    return sum(count for count, _ in done), [line for _, lines in done for line in lines]


def _to_segment(photos: Sequence[Path]) -> list[Path]:
    """The photos' files. UserError if two have one name."""
    passed_over: list[str] = []
    files = find_photos(photos, passed_over)
    if passed_over:
        say(f"{len(passed_over)} subfolders, other files or repeated links are ignored, such as {passed_over[0]}")
    name, times = Counter(file.name for file in files).most_common(1)[0]
    if times > 1:
        raise UserError(
            f"{times} photos are named {name}, so their results would overwrite each other: run them separately"
        )
    return files


def _failure(file: Path, error: BrokenFile | OSError, output: Path) -> str:
    if isinstance(error, BrokenFile):
        return str(error)
    why = error.strerror or error  # its name is too long, say; a full disk ends the command
    return f"photo {file}: cannot write its results ({why}): rename it, or check {output}"


def _write(found: _Results, words: Vocabulary, output: Path, rle: bool) -> None:
    (file, _, _, small), mask, other, attention = found
    stem = output / file.name
    shown = overlay(small, _small(mask))
    _save(stacked([Image.fromarray(shown), _legend([mask], words)]), Path(f"{stem}.overlay.png"))
    indices = Image.fromarray(mask)
    if mask.dtype == np.uint8:  # PNG has no larger palette
        indices.putpalette(palette().tobytes())  # the overlay's colours
    _save(indices, Path(f"{stem}.mask.png"))
    if rle:
        with writing(Path(f"{stem}.rle.json")):
            Path(f"{stem}.rle.json").write_text(json.dumps(coco_rle(mask, words.names)) + "\n")
    if other is not None:
        row = [small, overlay(small, _small(other)), shown]
        sheet = contact_sheet([row], ("photo", "teacher, dense", "student"), [file.name], 512)
        _save(stacked([sheet, _legend([other, mask], words)]), Path(f"{stem}.compare.png"))
    if attention is not None:
        _save(Image.fromarray(lit(small, attention)), Path(f"{stem}.attention.png"))


@torch.inference_mode()
def cls_attention(run: Run, teacher: Teacher, image: np.ndarray) -> np.ndarray:
    """Eq. 1 on a whole image: softmax of its CLS token over the student's features, (h, w) float32, sums to 1."""
    resized = short_side_to(image, run.config.views.size)[None]
    pixels = normalise(resized, teacher.mean, teacher.std)
    below, right = (-side % teacher.stride for side in pixels.shape[-2:])
    cls_token, _ = teacher.encode(nn.functional.pad(pixels, (0, right, 0, below)))
    device = run.text_features.device
    features = run.student(normalise(resized, run.student.mean, run.student.std).to(device))
    return attention(features, cls_token.to(device)).view(features.shape[2:]).cpu().numpy()


def coco_rle(mask: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Annotations of the classes in a mask (H, W), as pycocotools reads and writes them."""
    found = []
    for index in np.unique(mask[mask != ignore_index(len(names))]).tolist():
        runs = coco.encode(np.asfortranarray(mask == index, np.uint8))
        found.append(
            {
                "category_id": index,
                "category_name": names[index],
                "segmentation": {"size": runs["size"], "counts": runs["counts"].decode()},
                "area": int(coco.area(runs)),
                "bbox": coco.toBbox(runs).tolist(),
            }
        )
    return found


def _save(picture: Image.Image, path: Path) -> None:
    with writing(path):
        picture.save(path)


def _small(picture: np.ndarray) -> np.ndarray:
    """A photo (H, W, 3), or a mask (H, W), shrunk until its longest side is at most PICTURE_SIDE."""
    small = Image.fromarray(picture)
    small.thumbnail((PICTURE_SIDE,) * 2, Image.Resampling.BILINEAR if picture.ndim == 3 else Image.Resampling.NEAREST)
    return np.asarray(small)


def _legend(masks: Sequence[np.ndarray], words: Vocabulary) -> Image.Image:
    """The classes in the masks, the largest first, each with its share of every mask."""
    none = ignore_index(len(words.names))
    shares = 100 * np.stack([np.bincount(mask.ravel(), minlength=none + 1) / mask.size for mask in masks])
    found = np.flatnonzero(shares.any(axis=0))
    names = {}
    for index in found[np.argsort(-shares.sum(axis=0)[found], kind="stable")].tolist():
        texts = ("0" if not share else "< 1" if share < 1 else f"{share:.0f}" for share in shares[:, index])
        name = "none of these" if index == none else words.names[index]
        names[index] = f"{name} {', '.join(texts)} %"
    return legend(names, 4, none)
