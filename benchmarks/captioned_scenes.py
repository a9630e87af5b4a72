"""The training data of `scenes_teacher.py`: crops of rendered scenes, and captions of what they show."""

from collections.abc import Iterable, Sequence
from multiprocessing import get_context

import numpy as np
import open_clip
import torch
from torch import Tensor

from pipeline.data.scenes import CLASSES, SIZE, THINGS, render_scene, scene_rng
from pipeline.data.views import normalise

TEMPLATES = ("a photo of {}.", "a picture of {}.", "{} in the scene.", "there is {} here.")
# A class counts as visible from this many pixels on, as absent below the second number; captions leave out the rest.
VISIBLE_PIXELS, ABSENT_PIXELS = 80, 12
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
CROP, BATCH, CONCEPT_SHARE = 64, 128, 0.3  # crop side in pixels, images a step, share of single-concept renders


def _render(job: tuple[str, int, int]) -> tuple[np.ndarray, np.ndarray]:
    split, start, stop = job
    return _render_each(scene_rng(split, index) for index in range(start, stop))


def _render_each(streams: Iterable[np.random.Generator]) -> tuple[np.ndarray, np.ndarray]:
    images, masks = zip(*map(render_scene, streams), strict=True)
    return np.stack(images), np.stack(masks)


def render_pool(split: str, count: int, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` scenes: images (N, 128, 128, 3) uint8 and masks (N, 128, 128) uint8."""
    jobs = [(split, start, min(start + 100, count)) for start in range(0, count, 100)]
    with get_context("spawn").Pool(workers) as pool:
        images, masks = zip(*pool.imap(_render, jobs), strict=True)
    return np.concatenate(images), np.concatenate(masks)


def held_out(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Scenes as of `render_pool`, which no tower learns from."""
    return _render_each(scene_rng("pretrain_eval", 10_000 + index) for index in range(count))


def visibility(masks: np.ndarray) -> np.ndarray:
    """(N, H, W) masks -> (N, K) int8: 1 visible, 0 too small to tell, -1 absent."""
    flat = masks.reshape(len(masks), -1).astype(np.int64) + np.arange(len(masks))[:, None] * len(CLASSES)
    pixels = np.bincount(flat.ravel(), minlength=len(masks) * len(CLASSES)).reshape(len(masks), -1)
    return np.where(pixels >= VISIBLE_PIXELS, 1, np.where(pixels < ABSENT_PIXELS, -1, 0)).astype(np.int8)


def draw_images(
    rng: np.random.Generator, patch: int, scenes: tuple[np.ndarray, np.ndarray], concepts: np.ndarray
) -> tuple[Tensor, Tensor, np.ndarray]:
    """A batch of crops that begin at patch borders, so that their tokens keep the positions they have in the scene.

    Returns:
        images (B, 3, S, S) in CLIP's normalisation, corners (B, 2) as (row, column) of the position grid, and what the
        images show, (B, K) as `visibility`.
    """
    images, masks = scenes
    size, alone = CROP, round(BATCH * CONCEPT_SHARE)
    crops = BATCH - alone
    batch = np.empty((BATCH, size, size, 3), np.uint8)
    crop_masks = np.empty((crops, size, size), np.uint8)
    corners = rng.integers(0, (SIZE - size) // patch + 1, (BATCH, 2))
    for row in range(crops):
        index = rng.integers(len(images))
        if row % 2:  # half of the crops are drawn around a thing, which is rarer than stuff
            y, x = np.nonzero(masks[index] < len(THINGS))
            if len(y):
                pick = rng.integers(len(y))
                centred = np.array([y[pick], x[pick]]) - size // 2
                corners[row] = np.clip((centred + patch // 2) // patch, 0, (SIZE - size) // patch)
        top, left = corners[row] * patch
        batch[row] = images[index, top : top + size, left : left + size]
        crop_masks[row] = masks[index, top : top + size, left : left + size]
    seen = np.full((BATCH, len(CLASSES)), -1, np.int8)
    seen[:crops] = visibility(crop_masks)
    chosen = rng.integers(0, len(concepts), alone)
    batch[crops:] = concepts[chosen]
    seen[np.arange(crops, BATCH), chosen % len(CLASSES)] = 1
    for row in range(BATCH):  # mirroring and the order of the colour channels: no class depends on them
        batch[row] = batch[row, :, :: rng.choice((-1, 1))][..., rng.permutation(3)]
    return normalise(batch, MEAN, STD), torch.from_numpy(corners), seen


def write_caption(rng: np.random.Generator, classes: Sequence[int] | np.ndarray) -> str:
    """A caption that names the classes in the order given."""
    words = [CLASSES[index] for index in classes]
    phrase = words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
    return TEMPLATES[rng.integers(len(TEMPLATES))].format(phrase)


def draw_captions(rng: np.random.Generator, seen: np.ndarray, subsets: int = 44) -> tuple[list[str], np.ndarray]:
    """Captions and their match with each image, (B, captions): 1 positive, -1 negative, 0 not to be judged.

    One caption for every single class, and `subsets` captions that name 2-4 of the classes some image shows.
    """
    named = [[index] for index in range(len(CLASSES))]
    for row in rng.integers(0, len(seen), subsets):
        visible = np.flatnonzero(seen[row] == 1)
        if len(visible) > 1:
            named.append(list(rng.permutation(visible)[: rng.integers(2, 5)]))
    # A caption is as true as the least visible class it names.
    match = np.stack([seen[:, classes].min(axis=1) for classes in named], axis=1)
    return [write_caption(rng, classes) for classes in named], match
