"""Kills, power cuts and neighbours: what is recorded is whole, and the bytes do not depend on what happened."""

import itertools
import os
import signal

import pytest

from cache.files import write_atomically
from cache.layout import arrays_path, record_path, shard_path
from cache.reader import open_cache
from cache.writer import pending_shards


def killed_after(flushes: int, task):
    """`task`, during which the process kills itself in place of the fsync with this number."""

    def run():
        calls = itertools.count()

        def fsync(_):
            if next(calls) == flushes:
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = fsync
        task()

    return run


# An fsync comes before and after each file is put in place. By number, 1 is within the first file, the
# manifest under its temporary name; 16 amid the arrays' metadata; 28 just before and 29 just after the manifest is
# placed; 30-41 within shard 0: 32 amid its arrays, 40 before and 41 after its record; 65 is the last of all.
@pytest.mark.parametrize("flushes", [0, 1, 16, 28, 29, 30, 32, 39, 40, 41, 50, 65])
def test_killed_run_is_finished_to_the_same_bytes(stage_one, in_processes, flushes):
    killed, unbroken = stage_one("killed"), stage_one("unbroken")
    unbroken.run()
    assert in_processes(killed_after(flushes, killed.run)) == [-signal.SIGKILL]
    assert pending_shards(killed.run()) == []
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

    for name, spec in stage.specs.items():
        file = shard_path(stage.path, name, 0, spec)
        placed = events.index(("placed", file))
        content_flushed = events.index(("flushed", file.stat().st_ino))
        name_flushed = events.index(("flushed", file.parent.stat().st_ino), placed)
        assert content_flushed < placed < name_flushed < events.index(("placed", record_path(stage.path, 0)))
    assert events[-1] == ("flushed", record_path(stage.path, 0).parent.stat().st_ino)


def test_a_reader_never_sees_half_a_file(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_atomically(file, b"old")

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, b"new and longer")
    assert file.read_bytes() == b"old"


def test_no_array_is_left_with_strange_files(stage_one):
    """All that Zarr's own writing would leave, nested directories and *.partial files, is absent."""
    stage = stage_one()
    stage.run()
    for name in stage.specs:
        files = {path.name for path in (arrays_path(stage.path) / name).iterdir()}
        assert len(files) == 4 and "zarr.json" in files and all(f.startswith(("c.", "zarr.json")) for f in files)
