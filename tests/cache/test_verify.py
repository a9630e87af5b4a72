"""Every byte is watched over: what is damaged is found, restored to the same bytes, and nothing else is touched."""

import random

import pytest

from cache.layout import MANIFEST, copy_key
from cache.reader import open_cache
from cache.store import open_store
from cache.verify import gc, info, prepare_repair, verify
from cache.writer import create_cache, pending
from configs.errors import UserError


def found(stage):
    return {(damage.kind, damage.key, damage.shard) for damage in verify(stage.location)}


def flip(data, place):
    changed = bytearray(data)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


@pytest.mark.slow
def test_every_flipped_bit_is_found_and_repaired(stage_one):
    """In every file at least one, 1,000 in all, each alone; the damage names the file, and repair gives it back."""
    stage = stage_one(images=2, shard_images=1)
    stage.run()
    whole, draw = stage.tree(), random.Random(0)
    assert verify(stage.location) == []
    keys = list(whole) + draw.choices(list(whole), [len(data) for data in whole.values()], k=1000 - len(whole))
    for key in keys:
        (stage.path / key).write_bytes(flip(whole[key], draw.randrange(8 * len(whole[key]))))
        shard = next((i for i in range(2) if key == f"shards/{i:05d}.json" or f"/c.{i}." in key), None)
        shard = None if "text_features" in key else shard
        assert found(stage) == {("changed", key, shard)}, key
        prepare_repair(stage.location)
        assert pending(stage.location) == ([] if shard is None else [(shard, 0)])
        if shard is None:
            assert (stage.path / key).read_bytes() == whole[key]
        stage.run()
        assert stage.tree() == whole
    assert verify(stage.location) == []


def test_missing_files(stage_one):
    stage = stage_one()
    stage.run()
    whole = stage.tree()
    for key in whole:
        (stage.path / key).unlink()
        if key.startswith("shards/"):  # as if it had not been computed: what lies there is proved by nothing
            index = int(key[7:12])
            strays = {stage.file(name, index, view) for name in stage.specs for view in range(2)}
            expected = {("stray", path.relative_to(stage.path).as_posix(), None) for path in strays}
        else:
            shard = None if "text_features" in key else next((i for i in range(3) if f"/c.{i}." in key), None)
            expected = {("missing", key, shard)}
        assert found(stage) == expected
        (stage.path / key).write_bytes(whole[key])


def test_several_damages_at_once(stage_one):
    stage = stage_one()
    stage.run()
    whole = stage.tree()
    bad = [MANIFEST, "copies/image_ids.json", "shards/00002.json", "arrays/text_features/c.0.0"]
    for key in bad:
        (stage.path / key).write_bytes(b"{}")
    for view in range(2):
        stage.file("views", 0, view).unlink()
    assert {damage.key for damage in prepare_repair(stage.location)} == {
        *bad, "arrays/views/c.0.0.0", "arrays/views/c.0.1.0"
    }  # fmt: skip
    assert pending(stage.location) == [(0, 0), (2, 0)]
    stage.run()
    assert stage.tree() == whole


def test_both_manifests_damaged(stage_one):
    stage = stage_one()
    stage.run()
    for key in (MANIFEST, copy_key(MANIFEST)):
        (stage.path / key).write_bytes(b"[")
    for action in (verify, prepare_repair, gc):
        with pytest.raises(UserError, match=r"manifest.json is damaged"):
            action(stage.location)


def test_no_cache(tmp_path):
    for action in (verify, prepare_repair, gc, info):
        with pytest.raises(UserError, match=r"no cache at .*, it has no manifest.json"):
            action(tmp_path)
        with pytest.raises(UserError, match=r"no cache at .*nowhere, it has no manifest.json"):
            action(tmp_path / "nowhere")
    (tmp_path / "thesis.txt").write_text("years of work")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_incomplete_cache_is_not_damaged(stage_one):
    stage = stage_one()
    stage.create()
    stage.write(1)
    assert verify(stage.location) == []
    assert info(stage.location).shards_done == 1


def test_gc_removes_what_nothing_vouches_for(stage_one):
    stage = stage_one()
    stage.run()
    stage.record(2).unlink()  # shard 2 was never finished
    before = {key: data for key, data in stage.tree().items() if "/c.2." not in key}
    strays = {key: data for key, data in stage.tree().items() if "/c.2." in key}
    for key in ("manifest.json.tmp", "arrays/views/c.0.0.0.tmp", "arrays/old_array/c.0", "shards/notes", "copies/x"):
        (stage.path / key).parent.mkdir(exist_ok=True)
        (stage.path / key).write_bytes(b"12345")
        strays[key] = b"12345"
    (stage.path / "README").write_text("mine")  # beside the cache's own folders
    assert {(d.kind, d.key, d.shard) for d in verify(stage.location)} == {("stray", key, None) for key in strays}
    removed, freed = gc(stage.location)
    assert sorted(removed) == sorted(str(stage.path / key) for key in strays)
    assert freed == sum(map(len, strays.values()))
    assert stage.tree() == {**before, "README": b"mine"}
    assert verify(stage.location) == [] and gc(stage.location) == ([], 0)


def test_gc_leaves_the_shard_of_a_damaged_record(stage_one):
    stage = stage_one()
    stage.run()
    stage.record(1).write_text("{")
    assert gc(stage.location) == ([], 0)
    assert found(stage) == {("changed", "shards/00001.json", 1)}


def test_repair_and_gc_wait_for_nobody(stage_one):
    stage = stage_one()
    stage.run()
    with open_store(stage.location).lock():
        for action in (prepare_repair, gc):
            with pytest.raises(UserError, match="is being written by another precompute"):
                action(stage.location)
        assert verify(stage.location) == []  # the lock is no part of the cache


def test_info(stage_one):
    stage = stage_one()
    stage.run()
    about = info(stage.location)
    assert (about.shards_done, about.views_done, about.skipped) == (3, 16, 0)
    assert about.manifest.settings == stage.manifest.settings
    sizes = {key: len(data) for key, data in stage.tree().items()}
    for name in stage.specs:
        assert about.array_bytes[name] == sum(n for key, n in sizes.items() if key.startswith(f"arrays/{name}/"))
    assert sum(about.array_bytes.values()) + about.other_bytes == sum(sizes.values())
    more = stage_one(views=3)
    create_cache(more.location, more.manifest, more.image_ids, more.text_features)
    about = info(stage.location)
    assert (about.shards_done, about.views_done, about.manifest.views) == (0, 16, 3)
    more.write(0, 2)
    assert (info(stage.location).shards_done, info(stage.location).views_done) == (1, 19)


def test_open_after_repair(stage_one):
    stage = stage_one()
    stage.run()
    (stage.path / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"manifest.json is missing: run cache repair"):
        open_cache(stage.location)
    prepare_repair(stage.location)
    assert open_cache(stage.location).image_ids == stage.image_ids
