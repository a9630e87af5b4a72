"""Fixtures of the tests of stage one's clustering."""

from collections.abc import Callable

import pytest

from tests import reference
from tests.reference import Array


@pytest.fixture
def empty_clusters(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many clusters ran empty in the reference's K-means so far."""
    found: list[int] = []
    split = reference.split_empty

    def count(centroids: Array, sizes: Array, n: int) -> None:
        found.append(int((sizes == 0).sum()))
        split(centroids, sizes, n)

    monkeypatch.setattr(reference, "split_empty", count)
    return lambda: sum(found)
