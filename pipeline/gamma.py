"""Calibration on training data, without masks of unseen classes: the spread of each word's logits, and gamma.

A student uses some words more than others. The logits of words with masks in training vary most, and these words win
too many pixels of classes without masks. So `SPREAD` times the standard deviation of its logits on training images is
subtracted from each word's logits. Calibrated stacking follows, with the gamma of `keeping_gamma`. As R . T is linear,
one covariance matrix of R gives the standard deviation for any word. docs/evidence.md compares rules.
"""

from collections.abc import Iterable

import numpy as np

SPREAD = 0.7  # standard deviations; 0.5 to 1.3 give nearly the same
KEPT = 0.97  # of the seen classes' mean accuracy


def feature_covariance(features: Iterable[np.ndarray]) -> np.ndarray:
    """(C, C) float64 covariance of features (C, P) over all positions of all images; zero without any."""
    count, total, products = 0, np.zeros(()), np.zeros((1, 1))
    for of_image in features:
        exact = of_image.astype(np.float64)
        count, total, products = count + exact.shape[1], total + exact.sum(axis=1), products + exact @ exact.T
    mean = total / max(count, 1)
    return products / max(count, 1) - np.multiply.outer(mean, mean)


def keeping_gamma(margins: np.ndarray, predicted: np.ndarray, truth: np.ndarray, keep: float = KEPT) -> float | None:
    """The largest gamma at which the seen classes keep `keep` of their mean accuracy on annotated training pixels.

    On its training images, a student separates seen and unseen pixels further than on other images. A gamma that
    balances them there would take far too much from the seen classes elsewhere, so it is chosen where the margins of
    the seen pixels begin. Unannotated pixels are not used, as they may be ignored by design (a background, borders).
    docs/evidence.md compares rules.

    Args:
        margins: (P,) best seen minus best unseen logit of each annotated pixel.
        predicted, truth: (P,) integers from 0: the best seen class of each pixel, and its true class.

    Returns:
        The margin of one of the pixels; None if no pixel is classified correctly among the seen classes.
    """
    own = predicted == truth
    if not own.any():
        return None
    share = 1 / np.bincount(truth)[truth[own]]  # of a pixel in its class: all classes count alike
    falling = np.argsort(-margins[own], kind="stable")
    kept = np.cumsum(share[falling])
    last = np.searchsorted(kept, keep * kept[-1] * (1 - 1e-9))  # sums of equal shares are rounded
    return float(margins[own][falling[last]])
