"""Calibration: gamma against every threshold there is, and the covariance of features against NumPy's."""

from fractions import Fraction

import numpy as np
import pytest

from pipeline.gamma import feature_covariance, keeping_gamma
from tests.reference import Array


def mean_accuracy(margins: Array, predicted: Array, truth: Array, gamma: float) -> Fraction:
    """Of the classes that occur, where gamma is off the seen logits; a pixel on the edge stays seen."""
    right = [m >= gamma and p == t for m, p, t in zip(margins, predicted, truth, strict=True)]
    shares = []
    for name in set(truth.tolist()):
        of_class = [hit for hit, t in zip(right, truth, strict=True) if t == name]
        shares.append(Fraction(sum(of_class), len(of_class)))
    return sum(shares, Fraction()) / len(shares)


def brute_force(margins: Array, predicted: Array, truth: Array) -> float:
    """The largest margin, as gamma, that leaves 97 % of the mean accuracy."""
    whole = mean_accuracy(margins, predicted, truth, -np.inf)
    fits = [m for m in margins if 100 * mean_accuracy(margins, predicted, truth, m) >= 97 * whole]
    return max(fits)


def draw(rng: np.random.Generator, count: int, classes: int, digits: int) -> tuple[Array, Array, Array]:
    truth = rng.integers(0, classes, count) ** 2 // max(classes - 1, 1)  # some are rare, some absent
    predicted = np.where(rng.random(count) < 0.7, truth, rng.integers(0, classes, count))
    predicted[0] = truth[0]
    return rng.normal(1 + truth / 3, 2, count).round(digits), predicted, truth


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 40, 60, 113])
@pytest.mark.parametrize("classes", [1, 2, 7])
@pytest.mark.parametrize("digits", [0, 1, 9])  # with many ties, a few, and none
def test_equals_the_slow_reference(count: int, classes: int, digits: int) -> None:
    margins, predicted, truth = draw(np.random.default_rng([count, classes, digits]), count, classes, digits)
    own = predicted == truth
    wanted = brute_force(margins, predicted, truth)
    # Between two pixels of the right class the reference may stop at a pixel of a wrong one, which changes nothing.
    wanted = min(m for m in margins[own] if m >= wanted)
    before = margins.copy(), predicted.copy(), truth.copy()
    found = keeping_gamma(margins, predicted, truth)
    assert found == wanted and isinstance(found, float)
    for one, other in zip(before, (margins, predicted, truth), strict=True):
        np.testing.assert_array_equal(one, other)
    order = np.random.default_rng(0).permutation(count)
    assert keeping_gamma(margins[order], predicted[order], truth[order]) == found


def test_of_forty_pixels_one_is_lost() -> None:
    margins, one_class = np.arange(40.0), np.zeros(40, int)
    assert keeping_gamma(margins, one_class, one_class) == 1
    assert keeping_gamma(margins[:33], one_class[:33], one_class[:33]) == 0


def test_rare_classes_count_as_much_as_others() -> None:
    """A hundred pixels of the first class at 5, of the second one pixel at -3: half of the mean accuracy is its own."""
    truth = np.array([0] * 100 + [1])
    margins = np.where(truth == 0, 5.0, -3.0)
    assert keeping_gamma(margins, truth, truth) == -3
    assert keeping_gamma(margins, np.zeros_like(truth), truth) == 5  # what is not known cannot be kept


def test_it_moves_with_the_margins() -> None:
    """A student whose seen logits are all higher by 3 has a gamma higher by 3; one of twice the scale, twice that."""
    margins, predicted, truth = draw(np.random.default_rng(0), 500, 5, 9)
    found = keeping_gamma(margins, predicted, truth)
    assert found is not None
    assert keeping_gamma(margins + 3, predicted, truth) == pytest.approx(found + 3)
    assert keeping_gamma(2 * margins, predicted, truth) == pytest.approx(2 * found)


def test_all_equal() -> None:
    assert keeping_gamma(np.full(50, 0.25), np.arange(50) % 3, np.arange(50) % 2) == 0.25


@pytest.mark.parametrize("count", [0, 3])
def test_nothing_to_keep_is_no_number(count: int) -> None:
    assert keeping_gamma(np.ones(count), np.zeros(count, int), np.ones(count, int)) is None


def test_covariance_equals_numpy() -> None:
    rng = np.random.default_rng(0)
    images = [(rng.normal(size=(3, 5)) @ rng.normal(size=(5, count)) + 40).astype(np.float32) for count in (1, 7, 30)]
    found = feature_covariance(images)
    assert found == pytest.approx(np.cov(np.concatenate(images, axis=1), bias=True), rel=1e-9, abs=1e-9)


def test_covariance_of_nothing_or_of_one_value_is_zero() -> None:
    assert not feature_covariance([]).any()
    assert not feature_covariance([np.full((2, 4), 0.5, np.float32)] * 2).any()
