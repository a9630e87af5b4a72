"""Bounded look-ahead in threads, so that reading and computing overlap."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")


def ahead(pool: Executor, function: Callable[[_T], _R], items: Iterable[_T], depth: int) -> Iterator[_R]:
    """Yield `function` of each item, in order, computed in `pool`.

    At most `depth` items are in flight, so a slow consumer holds back the producer of `items`. Exceptions of `function`
    are raised in the consumer.
    """
    waiting: deque[Future[_R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
