"""Fingerprints and differences of settings, and manifests that must be refused."""

import json

import pytest

from cache.layout import manifest_path
from cache.manifest import Manifest, check_settings, different_settings, fingerprint
from configs.errors import UserError


def test_fingerprint_ignores_order_and_follows_values():
    assert fingerprint({"a": 1, "b": {"c": (1, 2), "d": None}}) == fingerprint({"b": {"d": None, "c": [1, 2]}, "a": 1})
    values = [1, 2, 1.0, True, "1", [1], None]
    assert len({fingerprint({"a": value}) for value in values}) == len(values)


def test_fingerprint_is_fixed():
    """A fingerprint that changes between versions of the code would orphan every cache that exists."""
    assert fingerprint({"b": 1, "a": {"c": 0.5}}).startswith("1d91c86e")


def test_fingerprint_survives_the_disk(stage_one):
    stage = stage_one(settings={"classes": {2: "cat", 10: "dog"}, "windows": (7, 3)})
    stage.create()
    assert Manifest.load(stage.path) == stage.manifest


def test_different_settings_names_each():
    cache = {"pseudo_labels": {"lambda": 0.8, "tau": 1}, "views": 2, "same": [1, 2], "old": "x"}
    asked = {"pseudo_labels": {"lambda": 0.7, "tau": True}, "views": 2, "same": (1, 2), "new": {"deep": None}}
    assert different_settings(cache, asked) == [
        "new.deep: cache nothing, asked null",
        'old: cache "x", asked nothing',
        "pseudo_labels.lambda: cache 0.8, asked 0.7",
        "pseudo_labels.tau: cache 1, asked true",
    ]
    assert different_settings(cache, cache) == []


def test_long_values_are_cut():
    (line,) = different_settings({"seen": ["a class"] * 171}, {"seen": []})
    assert len(line) < 120


def test_check_settings(stage_one):
    stage = stage_one()
    check_settings(stage.path, stage.manifest, json.loads(json.dumps(stage.manifest.settings)))
    asked = {**stage.manifest.settings, "pseudo_labels": {"lambda": 0.7, "windows": [7, 3]}}
    with pytest.raises(UserError, match=r"cache was made from other settings \(pseudo_labels.lambda: cache 0.8, asked"):
        check_settings(stage.path, stage.manifest, asked)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 1, r"manifest.json has format 1, this version of CLIP-ZSS reads format 2: delete"),
        ("images", None, r"manifest.json is damaged \(images: .*\): delete"),
        ("shard_images", 0, r"manifest.json is damaged \(shard_images: .*\): delete"),
        ("settings", {"lambda": 0.7}, r"manifest.json was edited, its fingerprint does not fit its settings"),
        ("unknown", 1, r"manifest.json is damaged \(unknown: .*\): delete"),
    ],
)
def test_refused_manifests(stage_one, key, value, message):
    stage = stage_one()
    stage.create()
    content = json.loads(manifest_path(stage.path).read_text())
    manifest_path(stage.path).write_text(json.dumps({**content, key: value}))
    with pytest.raises(UserError, match=message):
        Manifest.load(stage.path)


@pytest.mark.parametrize("garbled", [b"", b'{"format": 1, "fing', b"\xff\x00", b"[]"])
def test_garbled_manifest(stage_one, garbled):
    stage = stage_one()
    stage.create()
    manifest_path(stage.path).write_bytes(garbled)
    with pytest.raises(UserError, match=r"manifest.json .*: delete .* and run precompute again$"):
        Manifest.load(stage.path)
