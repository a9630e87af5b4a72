"""Views that are added later, and arrays that hold the first views alone."""

import signal

import numpy as np
import pytest

from cache.reader import open_cache
from cache.verify import verify
from cache.writer import pending, write_shard
from configs.errors import UserError


def test_more_views_are_added_to_the_same_bytes(stage_one):
    """As if all had been made at once; the first views' files are not written again."""
    stage, more, at_once = stage_one(), stage_one(views=4), stage_one("at once", views=4)
    stage.run()
    first = {path: path.stat().st_ino for path in stage.path.glob("arrays/*/c.?.[01].*")}
    assert len(first) == 3 * 2 * len(stage.specs)
    assert more.create().views == 4
    assert pending(stage.path) == [(0, 2), (1, 2), (2, 2)]
    with pytest.raises(UserError, match="incomplete, 0 of 3 shards are done"):
        open_cache(stage.path)
    more.run()
    at_once.run()
    assert more.tree() == at_once.tree()
    assert {path: path.stat().st_ino for path in first} == first
    for name, array in more.arrays.items():
        assert array.shape[1] == 4
        np.testing.assert_array_equal(open_cache(more.path).load(name), array, strict=True)
        np.testing.assert_array_equal(open_cache(more.path).read(name, 7), array[7], strict=True)


def test_fewer_views_change_nothing(stage_one):
    stage_one(views=4).run()
    before, fewer = stage_one(views=4).tree(), stage_one(views=1)
    assert fewer.create().views == 4
    assert pending(fewer.path) == [] and fewer.tree() == before


@pytest.mark.parametrize("was_read", [True, False])
def test_an_open_cache_reads_on_while_views_are_added(stage_one, was_read):
    """A training, say, that reads single images again when it validates."""
    stage, more = stage_one(), stage_one(views=4)
    cache = open_cache(stage.run())
    if was_read:
        np.testing.assert_array_equal(cache.read("views", 0), stage.arrays["views"][0])
    more.create()
    more.write(0, 2)
    np.testing.assert_array_equal(cache.load("dense_tokens"), stage.arrays["dense_tokens"], strict=True)
    for row in (0, 7):  # of a shard that has grown, and of one that has not
        np.testing.assert_array_equal(cache.read("views", row), stage.arrays["views"][row], strict=True)
        np.testing.assert_array_equal(cache.read("region_tokens", row, 1), stage.arrays["region_tokens"][row, 1])
    with pytest.raises(IndexError):  # it does not know of it
        cache.read("region_tokens", 0, 2)
    more.run()
    np.testing.assert_array_equal(open_cache(more.path).read("views", 0), more.arrays["views"][0], strict=True)
    np.testing.assert_array_equal(open_cache(more.path).read("region_tokens", 7, 3), more.arrays["region_tokens"][7, 3])


def test_interrupted_extension_keeps_the_old_views(stage_one, monkeypatch):
    stage, more = stage_one(), stage_one(views=3)
    stage.run()
    record = stage.record(1).read_bytes()
    more.create()

    def disk_full(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("cache.record.ShardRecord.to_bytes", disk_full)
        with pytest.raises(OSError, match="no space"):
            more.write(1, 2)
    assert stage.record(1).read_bytes() == record
    assert pending(stage.path) == [(0, 2), (1, 2), (2, 2)]
    strays = {damage.key for damage in verify(stage.path)}  # written, and not proved by a record
    assert strays == {path.relative_to(stage.path).as_posix() for path in stage.path.glob("arrays/*/c.1.2.*")}
    more.run()
    assert verify(stage.path) == []


# Of the fsyncs of an extension by one view: 0-11 zarr.json files, 12-13 the manifest, 14-27 copies, then the shards.
@pytest.mark.parametrize("flushes", [0, 5, 12, 13, 14, 19, 26, 28, 37, 39, 40, 42, 58])
def test_killed_extension_is_finished_to_the_same_bytes(stage_one, in_processes, killed_after, flushes):
    stage, more, at_once = stage_one(), stage_one(views=3), stage_one("at once", views=3)
    stage.run()
    assert in_processes(killed_after(flushes, more.run)) == [-signal.SIGKILL]
    more.run()
    at_once.run()
    assert more.tree() == at_once.tree()


@pytest.mark.parametrize("asked_again", [2, 3])
def test_extension_killed_before_the_manifest(stage_one, in_processes, killed_after, asked_again):
    """Some files fit the larger manifest that never came: asked for as many views as before, all is as before."""
    stage, more = stage_one(), stage_one(views=3)
    stage.run()
    before = stage.tree()
    assert in_processes(killed_after(5, more.create)) == [-signal.SIGKILL]
    assert stage.tree() != before
    np.testing.assert_array_equal(open_cache(stage.path).load("views"), stage.arrays["views"])
    stage_one(views=asked_again).run()
    assert verify(stage.path) == []
    if asked_again == 2:
        assert stage.tree() == before


def test_extensions_that_do_not_fit_the_record(stage_one):
    stage, more = stage_one(), stage_one(views=4)
    stage.run()
    more.create()
    with pytest.raises(ValueError, match=r"shard 0 of .* has 2 views, given those from 3"):
        more.write(0, 3)
    with pytest.raises(ValueError, match=r"shard 0 of .* from view 2 takes"):
        write_shard(more.path, 0, 2, more.block(0, 3))
    more.record(0).unlink()
    with pytest.raises(UserError, match=r"00000.json is missing"):
        more.write(0, 2)
    assert pending(stage.path) == [(0, 0), (1, 2), (2, 2)]


def test_skipped_images_of_all_views(stage_one):
    """An image that could not be read once is left out."""
    stage, more = stage_one(images=6), stage_one(images=6, views=3)
    stage.create()
    write_shard(stage.path, 0, 0, stage.block(0), {"image 1": "gone"})
    write_shard(stage.path, 1, 0, stage.block(1))
    assert open_cache(stage.path).kept_rows.tolist() == [0, 2, 3, 4, 5]
    more.create()
    write_shard(stage.path, 0, 2, more.block(0, 2), {"image 2": "gone, too"})
    write_shard(stage.path, 1, 2, more.block(1, 2))
    assert open_cache(stage.path).kept_rows.tolist() == [0, 3, 4, 5]
    assert open_cache(stage.path).skipped() == {"image 1": "gone", "image 2": "gone, too"}


@pytest.mark.parametrize("dense_views", [1, 3, 9])
def test_dense_tokens_of_the_first_views(stage_one, dense_views):
    stage, more = stage_one(dense_views=dense_views), stage_one(views=4, dense_views=dense_views)
    assert open_cache(stage.run()).load("dense_tokens").shape[1] == min(dense_views, 2)
    cache = open_cache(more.run())
    for name, array in more.arrays.items():
        assert array.shape[1] == (min(dense_views, 4) if name == "dense_tokens" else 4)
        np.testing.assert_array_equal(cache.load(name), array, strict=True)
        np.testing.assert_array_equal(cache.read(name, 4), array[4], strict=True)
    assert verify(more.path) == []
