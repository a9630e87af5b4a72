"""Photometric distortion, mmsegmentation's PhotoMetricDistortion."""

import colorsys
from itertools import product

import numpy as np
import pytest

from pipeline.data.distortion import Distortion, distort, draw_distortion
from tests.reference import Array

RANGES = {"added": (-32, 32), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5), "hue": (-0.1, 0.1)}
NOTHING = Distortion()


def slowly(image: Array, how: Distortion) -> Array:
    """One pixel after the other, by the standard library's HSV; uint8 between the parts but these two."""
    out = np.empty_like(image)
    for place in np.ndindex(image.shape[:2]):
        colour = [min(max(value + how.added, 0), 255) for value in image[place].tolist()]
        if not how.contrast_last:
            colour = [min(value * how.contrast, 255) for value in colour]
        colour = [int(value) for value in colour]
        if how.saturation != 1 or how.hue != 0:
            hue, saturation, value = colorsys.rgb_to_hsv(*(part / 255 for part in colour))
            turned = colorsys.hsv_to_rgb((hue + how.hue) % 1, min(saturation * how.saturation, 1), value)
            colour = [round(255 * part) for part in turned]
        if how.contrast_last:
            colour = [int(min(part * how.contrast, 255)) for part in colour]
        out[place] = colour
    return out


def colours() -> Array:
    """Every corner, edge and middle of the cube of colours; greys; then random ones. (60, 20, 3), above 32 rows."""
    chosen = list(product((0, 1, 127, 254, 255), repeat=3)) + [(grey,) * 3 for grey in range(0, 256, 15)]
    drawn = np.random.default_rng(0).integers(0, 256, (60 * 20 - len(chosen), 3))
    return np.concatenate([chosen, drawn]).astype(np.uint8).reshape(60, 20, 3)


@pytest.mark.parametrize("seed", range(24))
def test_every_pixel_as_by_the_standard_library(seed: int) -> None:
    """But for a half that floats round either way, which a contrast that follows can double."""
    image, how = colours(), draw_distortion(np.random.default_rng(seed))
    found, expected = distort(image, how), slowly(image, how)
    assert found.dtype == np.uint8 and found.shape == image.shape
    away = np.abs(found.astype(int) - expected)
    assert away.max() <= (2 if how.contrast_last else 1) and (away > 0).mean() < 0.01


@pytest.mark.parametrize("hue", [-0.1, 0.1, 1 / 6, -1 / 3, 0.5])
@pytest.mark.parametrize("saturation", [0.0, 1.0, 1.47])
def test_strong_turns(hue: float, saturation: float) -> None:
    how = Distortion(saturation=saturation, hue=hue)
    away = np.abs(distort(colours(), how).astype(int) - slowly(colours(), how))
    assert away.max() <= 1 and (away > 0).mean() < 0.01


@pytest.mark.parametrize("shape", [(1, 1), (32, 7), (33, 7), (3, 64)])
def test_nothing_asked_is_nothing_done_and_the_input_stays(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    before = image.copy()
    np.testing.assert_array_equal(distort(image, NOTHING), image)
    strong = distort(image, Distortion(32, 1.5, True, 1.5, 0.1))
    assert strong.shape == image.shape and not np.array_equal(strong, image)
    np.testing.assert_array_equal(image, before)


@pytest.fixture(scope="module")
def drawn() -> list[Distortion]:
    return [draw_distortion(np.random.default_rng([seed, 1])) for seed in range(2000)]


@pytest.mark.parametrize("part", RANGES)
def test_each_part_is_applied_half_the_time(part: str, drawn: list[Distortion]) -> None:
    """Uniformly in its range."""
    values = np.sort([getattr(how, part) for how in drawn if getattr(how, part) != getattr(NOTHING, part)])
    assert 900 < len(values) < 1100
    low, high = RANGES[part]
    assert low <= values[0] and values[-1] <= high
    distance = np.abs((values - low) / (high - low) - np.arange(len(values)) / len(values)).max()
    assert distance < 2 / np.sqrt(len(values))


def test_parts_do_not_hang_together(drawn: list[Distortion]) -> None:
    """All 16 subsets, equally often; contrast first or last, each half the time."""
    subsets = [tuple(getattr(how, part) != getattr(NOTHING, part) for part in RANGES) for how in drawn]
    counts = [subsets.count(subset) for subset in product((False, True), repeat=4)]
    assert min(counts) > 80 and max(counts) < 180
    last = [how.contrast_last for how in drawn if how.contrast != 1]
    assert 0.4 < np.mean(last) < 0.6
    factors = np.array([how[:2] + how[3:] for how in drawn])
    assert np.abs(np.corrcoef(factors.T) - np.eye(4)).max() < 0.1
