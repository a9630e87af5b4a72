"""How FAISS (1.15, split_clusters in Clustering.cpp) refills clusters that ran empty."""

from functools import lru_cache

import numpy as np

EPSILON = 1 / 1024


def split_empty(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each empty cluster, in turn, takes half of a donor's tokens and a centroid that differs a little from its own.

    FAISS walks round the clusters and takes one with probability (size - 1) / (n - k), by a random stream that starts
    anew at every update; after ten rounds it takes the largest. Even channels of the new centroid grow by EPSILON and
    odd ones shrink; those of the donor the other way round.

    Args:
        sizes: (k,) tokens in each cluster; more tokens than clusters.

    Returns:
        source (k,) int64 and factors (k, 2): the centroids become centroids[source], even channels times
        factors[:, 0], odd ones times factors[:, 1].
    """
    k = len(sizes)
    left = sizes.astype(np.float32)
    total = float(sizes.sum() - k)
    source, factors, drawn = np.arange(k), np.ones((k, 2)), 0
    shift = np.array([EPSILON, -EPSILON])
    for empty in np.flatnonzero(sizes == 0):
        chance = ((left.astype(np.float64) - 1) / total).astype(np.float32)
        hits = _stream(drawn + 10 * k)[drawn:].reshape(10, k) < chance
        if hits.any():
            attempt = int(hits.argmax())
            drawn += attempt + 1
            donor = attempt % k
        else:
            drawn += 10 * k
            donor = int(left.argmax())
        source[empty] = source[donor]
        factors[empty], factors[donor] = factors[donor] * (1 + shift), factors[donor] * (1 - shift)
        left[empty] = left[donor] / 2
        left[donor] -= left[empty]
    return source, factors


def _stream(length: int) -> np.ndarray:
    """The first numbers of FAISS's random stream, float32 from 0 to 1."""
    return _long_stream(1 << max(length - 1, 0).bit_length())[:length]


@lru_cache
def _long_stream(length: int) -> np.ndarray:
    numbers = np.random.RandomState(1234).randint(0, 2**32, length, dtype=np.uint32)
    return numbers.astype(np.float32) / np.float32(2**32 - 1)
