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
    total = float(sizes.sum() - k)
    left, chance = sizes.tolist(), ((sizes - 1) / total).astype(np.float32)  # lists: faster one element at a time
    source, even, odd, drawn = list(range(k)), [1.0] * k, [1.0] * k, 0
    empties = np.flatnonzero(sizes == 0).tolist()
    stream = _stream(10 * k * len(empties))
    for empty in empties:
        hits = stream[drawn : drawn + 10 * k].reshape(10, k) < chance
        attempt = int(hits.argmax())
        if hits.flat[attempt]:
            drawn += attempt + 1
            donor = attempt % k
        else:
            drawn += 10 * k
            donor = left.index(max(left))
        source[empty] = source[donor]
        even[empty], odd[empty] = even[donor] * (1 + EPSILON), odd[donor] * (1 - EPSILON)
        even[donor], odd[donor] = even[donor] * (1 - EPSILON), odd[donor] * (1 + EPSILON)
        left[empty] = left[donor] = left[donor] / 2
        chance[empty] = chance[donor] = (left[donor] - 1) / total
    return np.array(source), np.stack([even, odd], axis=1)


def _stream(length: int) -> np.ndarray:
    """The first numbers of FAISS's random stream, float32 from 0 to 1."""
    return _long_stream(1 << max(length - 1, 0).bit_length())[:length]


@lru_cache
def _long_stream(length: int) -> np.ndarray:
    numbers = np.random.RandomState(1234).randint(0, 2**32, length, dtype=np.uint32)
    return numbers.astype(np.float32) / np.float32(2**32 - 1)
