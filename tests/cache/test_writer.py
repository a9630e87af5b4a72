"""Creating, resuming and filling a cache."""

import pytest

from cache.layout import IMAGE_IDS, MANIFEST
from cache.manifest import Manifest
from cache.reader import open_cache
from cache.store import open_store
from cache.writer import pending, write_shard
from configs.errors import UserError


def test_same_settings_give_the_same_bytes(stage_one):
    first = stage_one("first", settings={"dataset": "voc", "views": 2})
    second = stage_one("second", settings={"views": 2, "dataset": "voc"})
    first.run()
    second.create()
    for index in (2, 0, 1):
        second.write(index)
    assert first.tree() == second.tree()
    assert len(first.tree()) > 20


def test_creating_again_changes_nothing(stage_one):
    stage = stage_one()
    stage.run()
    before = stage.tree()
    stage.create()
    assert stage.tree() == before
    assert pending(stage.path) == []


def test_lost_records_are_pending_and_their_shards_recomputed(stage_one):
    stage = stage_one()
    stage.run()
    before = stage.tree()
    stage.record(0).unlink()
    stage.record(2).write_text("{")
    assert pending(stage.path) == [(0, 0), (2, 0)]
    stage.run()
    assert stage.tree() == before


def test_data_without_a_record_is_pending(stage_one):
    stage, done = stage_one("killed"), stage_one("done")
    stage.create()
    done.run()
    for name in stage.specs:
        stage.file(name, 1).write_bytes(done.file(name, 1).read_bytes()[:-9])
    assert pending(stage.path) == [(0, 0), (1, 0), (2, 0)]
    stage.run()
    assert stage.tree() == done.tree()


def test_a_damaged_shard_can_be_written_over(stage_one):
    stage = stage_one()
    stage.run()
    before = stage.tree()
    for name in stage.specs:
        stage.file(name, 2).write_bytes(b"not a shard")
    stage.write(2)
    assert stage.tree() == before


def test_a_shard_written_anew_is_not_done_meanwhile(stage_one, monkeypatch):
    stage = stage_one()
    stage.run()

    def disk_full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("cache.writer.ShardCodec.encode", disk_full)
    with pytest.raises(OSError, match="no space"):
        stage.write(1)
    assert pending(stage.path) == [(1, 0)]


def test_other_settings_are_refused(stage_one):
    stage_one().run()
    other = stage_one(settings={"teacher": {"name": "ViT-B/16", "dense": "sclip"}, "pseudo_labels": {"lambda": 0.8}})
    with pytest.raises(UserError) as error:
        other.create()
    message = str(error.value)
    assert str(other.path) in message and "choose another --cache, or delete this one" in message
    assert 'teacher.dense: cache "clearclip", asked "sclip"' in message and "pseudo_labels.windows" in message
    assert "teacher.name" not in message and "\n" not in message


def test_other_images_are_refused(stage_one):
    stage_one().run()
    with pytest.raises(UserError, match=r"same settings but other data \(.*images: cache 8, asked 9"):
        stage_one(images=9).create()


def test_other_library_versions_continue_the_cache(stage_one):
    stage_one().create()
    later = stage_one(versions={"zarr": "4"})
    later.text_features = later.text_features + 1e-7  # another machine's last bits
    assert later.create().versions == {"zarr": "3"}
    later.run()
    assert (open_cache(later.path).text_features == stage_one("other").text_features).all()


@pytest.mark.parametrize("occupied", ["directory", "file"])
def test_somebody_elses_files_are_left_alone(stage_one, occupied):
    stage = stage_one()
    mine = stage.path / "arrays" / "thesis.txt" if occupied == "directory" else stage.path
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("years of work")
    with pytest.raises(UserError, match=r"cache exists and is not a cache.*: choose another --cache"):
        stage.create()
    assert mine.read_text() == "years of work"


def test_an_empty_directory_is_taken(stage_one):
    stage = stage_one()
    stage.path.mkdir()
    stage.run()
    assert open_cache(stage.path).image_ids == stage.image_ids


def test_a_killed_creation_is_begun_anew(stage_one):
    stage, other = stage_one("cache", dense="none"), stage_one("other", dense="none")
    stage_one("cache").create()
    (stage.path / MANIFEST).unlink()  # the last step had not come yet
    with pytest.raises(UserError, match=r"manifest.json is missing: run cache repair, or precompute with the same"):
        Manifest.load(open_store(stage.path))
    stage.run()
    other.run()
    assert stage.tree() == other.tree()


def test_precompute_mends_the_small_files(stage_one):
    stage = stage_one()
    stage.run()
    before = stage.tree()
    (stage.path / MANIFEST).write_text("{")
    for folder in (stage.path, stage.path / "copies"):  # both places: this machine makes them anew
        (folder / IMAGE_IDS).write_text("[")
        (folder / "arrays" / "zarr.json").write_text("")
        (folder / "arrays" / "cls_tokens" / "zarr.json").unlink()
        (folder / "arrays" / "text_features" / "c.0.0").write_bytes(b"")
    stage.create()
    assert stage.tree() == before


def test_a_lost_manifest_is_no_killed_creation(stage_one):
    """There are shards: nothing of them is cleared away, and other settings are still refused."""
    stage = stage_one()
    stage.run()
    before = stage.tree()
    (stage.path / MANIFEST).unlink()
    with pytest.raises(UserError, match="made with other settings"):
        stage_one(settings={"teacher": 1}).create()
    stage.create()
    assert stage.tree() == before


def test_text_features_that_this_machine_cannot_make(stage_one):
    stage = stage_one()
    stage.run()
    for folder in (stage.path, stage.path / "copies"):
        (folder / "arrays" / "text_features" / "c.0.0").write_bytes(b"")
    stage.text_features = stage.text_features + 1
    with pytest.raises(UserError, match=r"c.0.0 and its copy are damaged, and this machine computes different"):
        stage.create()


def test_wrong_blocks_are_refused(stage_one):
    stage = stage_one()
    stage.create()
    good = stage.block(2)
    wrong = [
        {name: array for name, array in good.items() if name != "views"},
        {**good, "more": good["views"]},
        {**good, "views": good["views"].astype("float64")},
        {**good, "views": good["views"][:1]},
        stage.block(0),
    ]
    for arrays in wrong:
        with pytest.raises(ValueError, match="shard 2 of"):
            write_shard(stage.path, 2, 0, arrays)
    with pytest.raises(IndexError):
        write_shard(stage.path, 3, 0, good)
    assert pending(stage.path) == [(0, 0), (1, 0), (2, 0)]
