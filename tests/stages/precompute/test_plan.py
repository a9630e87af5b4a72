"""The plan counts what is left to do, and stage one's timing names what the others wait for."""

import json
from pathlib import Path

import pytest

from cache.layout import array_specs
from cache.manifest import Manifest
from cache.store import open_store
from configs.errors import UserError
from stages.precompute.plan import TIMING, Timing, duration, plan, size, timed_runs


def manifest(images: int, views: int, shard_images: int, dense_views: int | None = None) -> Manifest:
    specs = array_specs(16, 4, 80, shard_images, dense_tokens="float16", dense_views=dense_views)
    return Manifest.describe({}, {}, [str(index) for index in range(images)], views, shard_images, specs)


CLS, GRID, DENSE, VIEW = 16 * 2, 4 * 4, 4 * 4 * 16 * 2, 5 * 4  # bytes of a view, from cache/layout.py's table
REGIONS = 10 * 16  # of ten groups, not of the 80 that there is room for


@pytest.mark.parametrize(
    ("images", "views", "shards", "pending", "dense_views", "dense"),
    [
        (10, 2, 3, [(0, 0), (1, 0), (2, 0)], None, 20),
        (10, 2, 3, [(0, 0), (1, 0), (2, 0)], 1, 10),
        (10, 3, 3, [(1, 2), (2, 0)], 2, 2 * 2),  # shard 1 lacks its third view, shard 2 of 2 images all
        (1, 1, 1, [(0, 0)], None, 1),
    ],
)
def test_what_is_left(images, views, shards, pending, dense_views, dense) -> None:
    about = manifest(images, views, 4, dense_views)
    assert about.shards == shards
    left = [(min(4, images - 4 * index), views - first) for index, first in pending]
    made = plan(about, pending, [0.5, 0.25], free=None)
    assert (made.images, made.shards) == (sum(rows for rows, _ in left), len(pending))
    assert made.views == sum(rows * count for rows, count in left)
    assert made.bytes == made.views * (CLS + 2 * GRID + REGIONS + VIEW) + dense * DENSE
    assert made.seconds == pytest.approx(made.views / (2 + 4)) and made.workers == 2


def test_nothing_to_do_and_no_speed() -> None:
    made = plan(manifest(4, 1, 4), [], [0.0], free=0)
    assert (made.images, made.views, made.bytes, made.seconds) == (0, 0, 0, 0.0)
    assert "0 views" in str(made)


def test_what_cannot_fit_is_refused_and_what_just_fits_is_not(tmp_path: Path) -> None:
    store, about = open_store(tmp_path), manifest(10, 2, 4)
    need = plan(about, [(0, 0)], [1.0], None).bytes
    plan(about, [(0, 0)], [1.0], need).check_room(store)
    with pytest.raises(UserError, match=r"free, and up to .* needed: free some space"):
        plan(about, [(0, 0)], [1.0], need - 1).check_room(store)
    free = store.free_bytes()
    assert free is not None and free > 0
    assert open_store(tmp_path / "not" / "there").free_bytes() == pytest.approx(free, rel=0.1)
    assert open_store("memory://plan").free_bytes() is None


def test_bottleneck_is_by_thread() -> None:
    timing = Timing({"read": 4, "teacher": 1, "write": 1})
    timing.add(3, {"read": 6.0, "teacher": 1.0, "write": 1.0})
    timing.add(2, {"read": 2.0, "teacher": 2.0, "write": 0.0})
    assert timing.views == 5 and timing.bottleneck == "teacher"
    assert "teacher" in str(timing).split("bottleneck")[1]
    assert str(Timing({"read": 1}))  # nothing measured


OLD = {"views": 1, "seconds": 1.0, "workers": 1, "busy_seconds": {"read": 1.0}, "bottleneck": "read"}


@pytest.mark.parametrize(
    "before", [None, b"", b"no json", b"{}", b'[{"views": 1}]', json.dumps([OLD]).encode()], ids=str
)
def test_timing_is_kept_beside_the_cache(tmp_path: Path, before: bytes | None) -> None:
    if before is not None:
        (tmp_path / TIMING).write_bytes(before)
    timing = Timing({"read": 1, "teacher": 1})
    timing.add(7, {"read": 0.5, "teacher": 1.25})
    timing.save(open_store(tmp_path), elapsed=2.0, workers=3)
    *older, last = json.loads((tmp_path / TIMING).read_text())
    assert older == ([OLD] if before and b"bottleneck" in before else [])
    assert last == {
        "views": 7, "seconds": 2.0, "workers": 3, "busy_seconds": {"read": 0.5, "teacher": 1.25},
        "bottleneck": "teacher",
    }  # fmt: skip
    assert timed_runs(open_store(tmp_path))[-1].busy_seconds == last["busy_seconds"]


def test_units() -> None:
    assert [size(count) for count in (0, 1500, 3_000_000, 5 * 10**11, 2 * 10**12)] == [
        "0.0 kB", "1.5 kB", "3.0 MB", "500.0 GB", "2.0 TB",
    ]  # fmt: skip
    times = [duration(seconds) for seconds in (0, 89, 90, 7200, 86400 * 3)]
    assert times == ["1 s", "89 s", "1.5 minutes", "2.0 hours", "3.0 days"]
