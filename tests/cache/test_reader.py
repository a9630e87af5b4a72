"""What goes in comes out; what is damaged is refused with the file and the cure."""

import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import zarr

from cache.layout import ARRAYS, IMAGE_IDS, MANIFEST, shard_key
from cache.reader import find_caches, open_cache
from cache.sealed import seal, unseal
from cache.verify import prepare_repair
from configs.errors import UserError


@pytest.mark.parametrize(("images", "shard_images"), [(8, 3), (6, 3), (10, 8), (2, 5), (1, 1)])
def test_round_trip(stage_one, images, shard_images):
    stage = stage_one(images=images, shard_images=shard_images)
    cache = open_cache(stage.run())
    assert cache.image_ids == stage.image_ids
    assert cache.manifest.model_copy(update={"files": {}}) == stage.manifest
    assert cache.names == sorted(stage.specs)
    np.testing.assert_array_equal(cache.text_features, stage.text_features, strict=True)
    for name, array in stage.arrays.items():
        np.testing.assert_array_equal(cache.load(name), array, strict=True)
        for row in range(images):
            np.testing.assert_array_equal(cache.read(name, row), array[row], strict=True)
            for view in range(array.shape[1]):
                np.testing.assert_array_equal(cache.read(name, row, view), array[row, view], strict=True)


def test_only_the_files_of_the_first_views_are_read(stage_one):
    stage = stage_one(dense_views=1)
    cache = open_cache(stage.run())
    for name, array in stage.arrays.items():
        np.testing.assert_array_equal(cache.load(name, 1), array[:, :1], strict=True)
        np.testing.assert_array_equal(cache.load(name, 9), array, strict=True)
    second = stage.path / shard_key("views", 0, 1, stage.specs["views"])
    second.write_bytes(second.read_bytes()[1:])
    np.testing.assert_array_equal(cache.load("views", 1), stage.arrays["views"][:, :1], strict=True)
    with pytest.raises(UserError, match=r"views/c\.0\.1"):
        cache.load("views")


def test_special_values_survive(stage_one):
    stage = stage_one()
    stage.arrays["cls_tokens"][0, 0] = [np.nan, -0.0, np.inf, 6e-8]
    assert open_cache(stage.run()).load("cls_tokens").tobytes() == stage.arrays["cls_tokens"].tobytes()


def test_other_tools_read_the_arrays(stage_one):
    stage = stage_one()
    group = zarr.open_group(stage.run() / ARRAYS, mode="r")
    assert {name for name, _ in group.arrays()} == {*stage.specs, "text_features"}
    np.testing.assert_array_equal(group["views"][:], stage.arrays["views"])


@pytest.mark.parametrize(("shard_images", "together"), [(3, 1), (4, 4), (16, 8)])
def test_one_image_is_a_chunk_of_dense_tokens_and_few_are_one_of_region_tokens(stage_one, shard_images, together):
    stage = stage_one(shard_images=shard_images)
    arrays = zarr.open_group(stage.run() / ARRAYS, mode="r")
    for name, spec in stage.specs.items():
        images = {"dense_tokens": 1, "region_tokens": together}.get(name, shard_images)
        assert arrays[name].chunks == (images, 1, *spec.tail)
        assert arrays[name].shards == (shard_images, 1, *spec.tail)


def test_rows_of_no_group_take_next_to_no_room(stage_one):
    """On the disk M may be large."""
    stage = stage_one(images=3)
    spec = stage.specs["region_tokens"].model_copy(update={"tail": (80, 512)})
    stage.specs["region_tokens"] = spec
    stage.arrays["region_tokens"] = np.zeros((3, 2, 80, 512), np.int8)
    stage.arrays["region_tokens"][:, :, :2] = np.random.default_rng(0).integers(-127, 128, (3, 2, 2, 512))
    stage.manifest = stage.manifest.model_copy(update={"arrays": stage.specs})
    cache = open_cache(stage.run())
    assert stage.file("region_tokens", 0).stat().st_size < 3 * (2 * 512 + 100)
    np.testing.assert_array_equal(cache.read("region_tokens", 2, 1), stage.arrays["region_tokens"][2, 1], strict=True)


def test_a_cache_goes_to_loader_workers(stage_one):
    stage = stage_one()
    sent = pickle.loads(pickle.dumps(open_cache(stage.run())))
    np.testing.assert_array_equal(sent.read("dense_tokens", 7), stage.arrays["dense_tokens"][7])
    alone = pickle.loads(pickle.dumps(open_cache(stage.path).reader("region_tokens")))
    np.testing.assert_array_equal(alone(7, 1), stage.arrays["region_tokens"][7, 1])


def test_what_loader_workers_get_does_not_grow_with_the_cache(stage_one):
    """Records of COCO-Stuff's shards are 20 MiB in every worker."""
    few, many = (open_cache(stage_one(f"{n}", images=n, shard_images=1).run()) for n in (2, 40))
    sizes = [len(pickle.dumps(cache.reader("region_tokens"))) for cache in (few, many)]
    assert sizes[1] < sizes[0] + 20 and len(pickle.dumps(many)) > len(pickle.dumps(few)) + 20_000


def test_one_view_is_read_of_its_own_file(stage_one):
    """The others may even be gone."""
    stage = stage_one()
    cache = open_cache(stage.run())
    stage.file("region_tokens", 1, 0).unlink()
    np.testing.assert_array_equal(cache.read("region_tokens", 4, 1), stage.arrays["region_tokens"][4, 1], strict=True)
    with pytest.raises(UserError, match=r"region_tokens/c\.1\.0\.0\.0 is missing or does not match"):
        cache.read("region_tokens", 4, 0)


def test_rows_and_arrays_that_do_not_exist(stage_one):
    cache = open_cache(stage_one(dense_views=1).run())
    for name, view in (("views", -1), ("views", 2), ("dense_tokens", 1)):
        with pytest.raises(IndexError):
            cache.read(name, 0, view)
    cache = open_cache(stage_one("without", dense="none").run())
    with pytest.raises(UserError, match=r"without has no dense_tokens \(it has cls_tokens, kmeans_labels, .*\)"):
        cache.load("dense_tokens")
    for row in (-1, 8):
        with pytest.raises(IndexError):
            cache.read("views", row)


def test_no_cache(tmp_path):
    with pytest.raises(UserError, match=r"no cache at .*nowhere, it has no manifest.json: run precompute first"):
        open_cache(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no cache at .*, it has no manifest.json: run precompute first"):
        open_cache(tmp_path)
    (tmp_path / "file").write_text("years of work")
    with pytest.raises(UserError, match=r"file exists and is not a cache"):
        open_cache(tmp_path / "file")


def test_incomplete_cache(stage_one):
    stage = stage_one()
    stage.create()
    stage.write(1)
    with pytest.raises(UserError, match=r"1 of 3 shards are done: run precompute with the same settings again to"):
        open_cache(stage.path)


def flip_a_byte(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 4
    file.write_bytes(data)


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def delete(file):
    file.unlink()


def refusal(action) -> str:
    with pytest.raises(UserError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, delete])
@pytest.mark.parametrize("name", ["cls_tokens", "kmeans_labels", "dense_tokens", "region_tokens"])
def test_damaged_shard(stage_one, damage, name):
    """kmeans_labels are zeros, as Zarr makes up for a missing file: the file must be there all the same."""
    stage = stage_one()
    stage.run()
    file = stage.file(name, 1, 1)
    damage(file)
    cache = open_cache(stage.path)
    expected = (
        f"{file} is missing or does not match its completion record: run cache repair, which recomputes only this shard"
    )
    assert refusal(lambda: cache.load(name)) == expected
    refused = 0
    for row in range(8):  # a single image is right or refused
        try:
            np.testing.assert_array_equal(cache.read(name, row), stage.arrays[name][row])
        except UserError as error:
            assert str(error) == expected
            refused += 1
            assert refusal(lambda row=row: cache.read(name, row, 1)) == expected
        np.testing.assert_array_equal(cache.read(name, row, 0), stage.arrays[name][row, 0])
    assert refused == (1 if name in ("dense_tokens", "region_tokens") and damage is flip_a_byte else 3)

    prepare_repair(stage.path)  # the cure, as told
    stage.run()
    np.testing.assert_array_equal(open_cache(stage.path).load(name), stage.arrays[name])


def test_valid_shard_of_other_values(stage_one):
    """Readable bytes which are not those of the record: only the hash can tell."""
    stage, other = stage_one("cache"), stage_one("other")
    other.arrays["pseudo_labels"][4, 1] ^= 1
    stage.run()
    other.run()
    stage.file("pseudo_labels", 1, 1).write_bytes(other.file("pseudo_labels", 1, 1).read_bytes())
    assert "does not match its completion record" in refusal(lambda: open_cache(stage.path).load("pseudo_labels"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "0" * 64}, r"00001.json belongs to a cache made with other settings: run cache repair, or"),
        ({"rows": [0, 3]}, r"00001.json describes other rows or arrays than the manifest: run cache repair, or"),
        ({"arrays": {}}, r"00001.json describes other rows or arrays than the manifest: run cache repair, or"),
        ({"views": 3}, r"00001.json describes other rows or arrays than the manifest: run cache repair, or"),
        ({"views": 1}, r"00001.json describes other rows or arrays than the manifest: run cache repair, or"),
        ({"rows": None}, r"00001.json is damaged \(.*\): run cache repair, or"),
    ],
)
def test_stale_record(stage_one, changes, message):
    stage = stage_one()
    stage.run()
    before = stage.record(1).read_bytes()
    stage.record(1).write_bytes(seal({**unseal(before), **changes}))
    assert re.search(message, refusal(lambda: open_cache(stage.path)))
    stage.run()  # the cure, as told
    assert stage.record(1).read_bytes() == before


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, delete])
@pytest.mark.parametrize(
    "file",
    ["image_ids.json", "arrays/cls_tokens/zarr.json", "arrays/text_features/zarr.json", "arrays/text_features/c.0.0"],
)
def test_damaged_small_file(stage_one, damage, file):
    stage = stage_one()
    stage.run()
    before = stage.tree()
    damage(stage.path / file)
    if "cls_tokens" in file:  # only the reading of single images needs it
        message = refusal(lambda: open_cache(stage.path).read("cls_tokens", 0))
    else:
        message = refusal(lambda: open_cache(stage.path))
    assert str(stage.path / file) in message
    assert message.endswith(": run cache repair, or precompute with the same settings again: both restore this file")
    stage.run()  # the cure, as told
    assert stage.tree() == before


def test_metadata_of_another_array(stage_one):
    stage = stage_one()
    arrays = stage.run() / ARRAYS
    (arrays / "cls_tokens" / "zarr.json").write_bytes((arrays / "views" / "zarr.json").read_bytes())
    cache = open_cache(stage.path)
    assert "cls_tokens/zarr.json is missing or damaged" in refusal(lambda: cache.read("cls_tokens", 0))
    np.testing.assert_array_equal(cache.load("cls_tokens"), stage.arrays["cls_tokens"])


def test_image_ids_of_another_cache(stage_one):
    stage = stage_one()
    stage.run()
    (stage.path / IMAGE_IDS).write_text(json.dumps(stage.image_ids[::-1]))
    assert "image_ids.json is missing or does not match the manifest" in refusal(lambda: open_cache(stage.path))


def test_find_caches(stage_one, tmp_path):
    for age, directory in enumerate(["new", "deep/below/old", "new/within"]):
        stage = stage_one(directory)
        stage.run()
        for index in range(3):
            os.utime(stage.record(index), (0, 1000 - 10 * age - index))
    stage_one("incomplete").create()
    broken = stage_one("broken")
    (broken.run() / MANIFEST).write_text("{")
    (tmp_path / "manifest.json").write_text("[]")  # somebody else's
    expected = [tmp_path / directory for directory in ("new", "deep/below/old", "new/within")]
    assert [Path(cache.location) for cache in find_caches(tmp_path)] == expected
    assert [Path(cache.location) for cache in find_caches(expected[1])] == [expected[1]]
    assert list(find_caches(tmp_path / "nowhere")) == []
