"""Work ahead in threads: in order, bounded, and errors reach who waits for them."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from stages.common.ahead import ahead


@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
@pytest.mark.parametrize("depth", [1, 2, 7])
def test_order_is_kept_however_long_each_takes(count: int, depth: int) -> None:
    def slow_when_even(item: int) -> int:
        time.sleep(0.002 * (item % 2 == 0))
        return item * item

    with ThreadPoolExecutor(4) as pool:
        assert list(ahead(pool, slow_when_even, range(count), depth)) == [item * item for item in range(count)]


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_than_depth_are_taken_and_not_handed_on(depth: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(20):
            taken.append(item)
            yield item

    with ThreadPoolExecutor(4) as pool:
        for handed_on, _ in enumerate(ahead(pool, lambda item: item, items(), depth)):
            time.sleep(0.001)
            assert len(taken) - handed_on <= depth


def test_it_runs_in_the_pool_while_the_consumer_works() -> None:
    here, met = threading.get_ident(), threading.Barrier(2, timeout=10)

    def meet(item: int) -> int:
        if item == 1:
            met.wait()  # only if item 1 is worked at while item 0 is consumed
        return threading.get_ident()

    with ThreadPoolExecutor(1) as pool:
        results = ahead(pool, meet, range(3), 2)
        assert next(results) != here
        met.wait()
        assert len(list(results)) == 2


def test_an_error_comes_in_its_place_and_what_waits_is_dropped() -> None:
    done: list[int] = []

    def fail_at_two(item: int) -> int:
        if item == 2:
            raise ValueError("two")
        done.append(item)
        return item

    got = []
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="two"):
        for item in ahead(pool, fail_at_two, range(1000), 4):
            got.append(item)
    assert got == [0, 1] and len(done) < 10


def test_an_error_of_the_producer_reaches_the_consumer() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("gone")

    with ThreadPoolExecutor(1) as pool, pytest.raises(OSError, match="gone"):
        list(ahead(pool, lambda item: item, items(), 3))
