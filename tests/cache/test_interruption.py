"""Kills, power cuts and neighbours: what is recorded is whole, and the bytes do not depend on what happened."""

import os
import signal

import pytest

from cache.reader import open_cache
from cache.store import open_store
from cache.writer import pending


# An fsync comes before and after each file is put in place, and after each new directory. By number, 2 is within the
# first file, the manifest's copy; 16 amid the arrays' metadata; 60 just before and 61 after the manifest is placed;
# 62-88 within shard 0: 68 and 79 amid its arrays, 87 before and 88 after its record; 140 is the last of all.
@pytest.mark.parametrize("flushes", [0, 1, 2, 3, 16, 60, 61, 62, 68, 79, 85, 87, 88, 100, 140])
def test_killed_run_is_finished_to_the_same_bytes(stage_one, in_processes, killed_after, flushes):
    killed, unbroken = stage_one("killed"), stage_one("unbroken")
    unbroken.run()
    assert in_processes(killed_after(flushes, killed.run)) == [-signal.SIGKILL]
    assert pending(killed.run()) == []
    assert killed.tree() == unbroken.tree()


def test_parallel_shards_lose_nothing(stage_one, in_processes):
    stage = stage_one(images=24, shard_images=2)
    stage.create()

    def every_other(first):
        return lambda: [stage.write(index) for index in range(first, 12, 2)]

    assert in_processes(every_other(0), every_other(1)) == [0, 0]
    cache = open_cache(stage.path)
    for name, array in stage.arrays.items():
        assert (cache.load(name) == array).all()


def test_data_is_on_disk_before_the_record_names_it(stage_one, monkeypatch):
    stage = stage_one()
    stage.create()
    events = []
    flush, replace = os.fsync, os.replace

    def logged_fsync(descriptor):
        flush(descriptor)
        events.append(("flushed", os.fstat(descriptor).st_ino))

    def logged_replace(source, target):
        replace(source, target)
        events.append(("placed", target))

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    stage.write(0)

    for name in stage.specs:
        for view in range(2):
            file = stage.file(name, 0, view)
            placed = events.index(("placed", file))
            content_flushed = events.index(("flushed", file.stat().st_ino))
            name_flushed = events.index(("flushed", file.parent.stat().st_ino), placed)
            assert content_flushed < placed < name_flushed < events.index(("placed", stage.record(0)))
    assert events[-1] == ("flushed", stage.record(0).parent.stat().st_ino)


def test_a_reader_never_sees_half_a_file(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    store.write("file", b"old")

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.write("file", b"new and longer")
    assert store.read("file") == b"old"


def test_no_array_is_left_with_strange_files(stage_one):
    """All that Zarr's own writing would leave, nested directories and *.partial files, is absent."""
    stage = stage_one()
    stage.run()
    for name in stage.specs:
        files = {path.name for path in (stage.path / "arrays" / name).iterdir()}
        assert len(files) == 7 and "zarr.json" in files and all(f.startswith(("c.", "zarr.json")) for f in files)
