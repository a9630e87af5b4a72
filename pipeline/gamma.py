"""Choosing gamma for calibrated stacking on training data, without masks of unseen classes."""

import numpy as np

KEPT = 0.95  # of the seen classes' mean accuracy


def keeping_gamma(margins: np.ndarray, predicted: np.ndarray, truth: np.ndarray) -> float | None:
    """The largest gamma at which the seen classes keep `KEPT` of their mean accuracy on annotated training pixels.

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
    last = np.searchsorted(kept, KEPT * kept[-1] * (1 - 1e-9))  # sums of equal shares are rounded
    return float(margins[own][falling[last]])
