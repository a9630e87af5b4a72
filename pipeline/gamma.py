"""Gamma without a mask of an unseen class: calibrated stacking, chosen on what training may see."""

import numpy as np

KEPT = 0.95  # of the seen classes' mean accuracy


def keeping_gamma(margins: np.ndarray, predicted: np.ndarray, truth: np.ndarray) -> float | None:
    """The largest gamma that leaves the seen classes `KEPT` of their mean accuracy on annotated pixels of training.

    A student knows the masks that it learnt from: on these images seen and unseen lie further apart than on others, and
    a gamma that divides them evenly takes far too much from the seen classes on others. Where their margins begin is
    where the two meet elsewhere. Unannotated pixels have no say: what is ignored by design (a background, borders)
    would spoil it. docs/evidence.md compares rules.

    Args:
        margins: (P,) best seen minus best unseen logit of each annotated pixel.
        predicted, truth: (P,) integers from 0 on: its best seen class, and its own.

    Returns:
        The margin of one of the pixels; None where no pixel's best seen class is its own: there is nothing to keep.
    """
    own = predicted == truth
    if not own.any():
        return None
    share = 1 / np.bincount(truth)[truth[own]]  # of a pixel in its class: all classes count alike
    falling = np.argsort(-margins[own], kind="stable")
    kept = np.cumsum(share[falling])
    last = np.searchsorted(kept, KEPT * kept[-1] * (1 - 1e-9))  # sums of equal shares are rounded
    return float(margins[own][falling[last]])
