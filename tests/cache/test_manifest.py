"""Fingerprints and differences of settings, and manifests that must be refused."""

import json

import pytest

from cache.layout import MANIFEST, copy_key
from cache.manifest import Manifest, check_settings, different_settings, fingerprint
from cache.reader import open_cache
from cache.sealed import seal, unseal
from cache.store import open_store
from cache.verify import gc, info, prepare_repair, verify
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
    made = stage.create()
    assert Manifest.load(open_store(stage.path)) == made
    assert made.model_copy(update={"files": {}}) == stage.manifest


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
    with pytest.raises(UserError, match=r"cache was made with other settings \(pseudo_labels.lambda: cache 0.8, asked"):
        check_settings(stage.path, stage.manifest, asked)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 5, r"manifest.json has format 5, but this version of CLIP-ZSS reads format 4: delete"),
        ("images", None, r"manifest.json is damaged \(images: .*\): run cache repair"),
        ("shard_images", 0, r"manifest.json is damaged \(shard_images: .*\): run cache repair"),
        ("settings", {"lambda": 0.7}, r"manifest.json was edited: its fingerprint does not match its settings"),
        ("unknown", 1, r"manifest.json is damaged \(unknown: .*\): run cache repair"),
    ],
)
def test_refused_manifests(stage_one, key, value, message):
    stage = stage_one()
    stage.create()
    content = unseal((stage.path / MANIFEST).read_bytes())
    (stage.path / MANIFEST).write_bytes(seal({**content, key: value}))
    with pytest.raises(UserError, match=message):
        Manifest.load(open_store(stage.path))


@pytest.mark.parametrize("number", [2, 3])
def test_caches_of_older_versions(stage_one, number):
    """Manifests of format 2 had no checksum; format 3 had no region tokens."""
    stage = stage_one()
    stage.create()
    content = {**unseal((stage.path / MANIFEST).read_bytes()), "format": number}
    del content["arrays"]["region_tokens"]
    old = json.dumps(content).encode() if number == 2 else seal(content)
    for key in (MANIFEST, copy_key(MANIFEST)):
        (stage.path / key).write_bytes(old)
    says = rf"has format {number}, but this version of CLIP-ZSS reads format 4: delete .* and run precompute again$"
    for action in (open_cache, verify, info, prepare_repair, gc, lambda _: stage.create()):
        with pytest.raises(UserError, match=says):
            action(stage.path)


@pytest.mark.parametrize("garbled", [b"", b'{"format": 1, "fing', b"\xff\x00", b"[]", b'{"checksum": 1, "format": 2}'])
def test_garbled_manifest(stage_one, garbled):
    stage = stage_one()
    stage.create()
    (stage.path / MANIFEST).write_bytes(garbled)
    with pytest.raises(UserError, match=r"manifest.json is damaged \(.*\): run cache repair, it restores"):
        Manifest.load(open_store(stage.path))


def test_every_bit_of_a_sealed_file_counts():
    content = {"a": [1, 2.5, None, True], "b": {"c": "d\u00e9"}, "checksum of something": "x"}
    data = seal(content)
    assert unseal(data) == content
    for place in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(ValueError):
            unseal(bytes(flipped))
    for other in (data[:-1], data + b"\n", b"", b"null", b"[]"):
        with pytest.raises(ValueError):
            unseal(other)
