"""Arrays that live in another cache."""

import pickle

import numpy as np
import pytest

from cache.layout import MANIFEST
from cache.manifest import Borrowed, Manifest
from cache.reader import open_cache
from cache.verify import verify
from cache.writer import create_cache, write_shard
from configs.errors import UserError

TOKENS = ("cls_tokens", "dense_tokens", "views")


def borrow(stage, lender, views=2):
    """A cache at `stage` whose own arrays are labels and region tokens; the rest lives in `lender`."""
    borrowed = {name: Borrowed(cache=str(lender.path), fingerprint=lender.manifest.fingerprint) for name in TOKENS}
    stage.specs = {name: spec for name, spec in stage.specs.items() if name not in TOKENS}
    stage.arrays = {name: ~array for name, array in stage.arrays.items() if name in stage.specs}
    stage.manifest = Manifest.describe(
        {"lambda": 0.5}, {}, stage.image_ids, views, 3, stage.specs, borrowed=borrowed
    )  # fmt: skip
    stage.run()


def test_borrowed_arrays(stage_one):
    lender, stage = stage_one("lender"), stage_one("labels")
    lender.create()
    for index in range(3):
        write_shard(lender.path, index, 0, lender.block(index), {"image 4": "gone"} if index == 1 else {})
    borrow(stage, lender)
    assert not any(name in key for key in stage.tree() for name in TOKENS)
    cache = open_cache(stage.path)
    assert cache.names == sorted(lender.specs) and 4 not in cache.kept_rows and len(cache.kept_rows) == 7
    for name, array in {**lender.arrays, **stage.arrays}.items():
        np.testing.assert_array_equal(cache.load(name), array, strict=True)
        np.testing.assert_array_equal(cache.load(name, 1), array[:, :1], strict=True)
        np.testing.assert_array_equal(cache.load_shard(name, 1), array[3:6], strict=True)
        np.testing.assert_array_equal(cache.read(name, 2), array[2], strict=True)
        np.testing.assert_array_equal(cache.read(name, 2, 1), array[2, 1], strict=True)
    assert verify(stage.path) == []


def test_a_lender_may_have_more_views(stage_one):
    lender, stage = stage_one("lender", views=4), stage_one("labels")
    lender.run()
    borrow(stage, lender)
    cache = open_cache(stage.path)
    for name in TOKENS:
        np.testing.assert_array_equal(cache.load(name), lender.arrays[name][:, :2], strict=True)
        np.testing.assert_array_equal(cache.read(name, 2), lender.arrays[name][2, :2], strict=True)
        sent = pickle.loads(pickle.dumps(cache.reader(name)))  # as a loader's worker gets it
        np.testing.assert_array_equal(sent(2, 1), lender.arrays[name][2, 1], strict=True)
        with pytest.raises(IndexError):
            sent(2, 2)


@pytest.mark.parametrize("change", ["gone", "incomplete", "other settings", "no dense tokens"])
def test_a_lender_that_is_another_cache_now(stage_one, change):
    lender, stage = stage_one("lender"), stage_one("labels")
    lender.run()
    borrow(stage, lender)
    if change == "gone":
        lender.path.rename(lender.path.with_name("elsewhere"))
    elif change == "incomplete":
        lender.record(0).unlink()
    else:
        lender.path.rename(lender.path.with_name("elsewhere"))
        stage_one("lender", **({"dense": "none"} if "dense" in change else {"settings": {"a": 1}})).run()
    with pytest.raises(UserError) as error:
        open_cache(stage.path)
    assert f"{stage.path} shares " in str(error.value) and str(lender.path) in str(error.value)
    assert "\n" not in str(error.value)


def test_borrowing_is_part_of_what_a_cache_is(stage_one):
    lender, stage = stage_one("lender"), stage_one("labels")
    lender.run()
    borrow(stage, lender)
    other = stage.manifest.borrowed["views"].model_copy(update={"cache": "elsewhere"})
    changed = stage.manifest.model_copy(update={"borrowed": {**stage.manifest.borrowed, "views": other}})
    before = (stage.path / MANIFEST).read_bytes()
    with pytest.raises(UserError, match=r"same settings but other data \(borrowed.views.cache: cache .*elsewhere"):
        create_cache(stage.path, changed, stage.image_ids, stage.text_features)
    assert (stage.path / MANIFEST).read_bytes() == before
