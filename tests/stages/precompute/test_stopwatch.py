"""The time that each part of stage one takes."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from stages.precompute.stopwatch import Stopwatch


def test_stopwatch_adds_threads_up_also_when_they_fail() -> None:
    watch = Stopwatch("read", "write")

    def wait() -> None:
        with watch("read"):
            time.sleep(0.02)
            raise ValueError

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(wait) for _ in range(4)]:
            with pytest.raises(ValueError):
                future.result()
    assert watch.seconds["read"] >= 4 * 0.02 and watch.seconds["write"] == 0
    with pytest.raises(KeyError), watch("nothing"):
        pass
