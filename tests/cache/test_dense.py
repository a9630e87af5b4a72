"""Dense tokens come back as close as their encoding promises, whatever they hold."""

import numpy as np
import pytest

from cache.base import Store
from cache.dense import Pca, decode_dense, encode_dense, pca_size
from cache.layout import array_specs, copy_key
from cache.reader import open_cache
from cache.store import open_store
from cache.verify import prepare_repair, verify
from cache.writer import create_cache, stored_pca
from configs.errors import UserError
from tests.cache.conftest import GRID, VIEWS, WIDTH

LARGEST = 65504.0
PCA_FILES = ("arrays/pca_mean/zarr.json", "arrays/pca_components/c.0.0")


def random_pca(width: int, size: int, seed: int = 0) -> Pca:
    random = np.random.default_rng(seed)
    components = np.linalg.qr(random.normal(size=(width, width)))[0][:size]
    return Pca(random.normal(size=width).astype("float32"), components.astype("float32"))


def slow_int8(token: np.ndarray) -> tuple[list[int], float]:
    """One token, in exact arithmetic where it matters: the least float16 scale under which nothing exceeds 127."""
    largest = max(abs(float(value)) for value in token)
    scale = float(np.float16(min(largest / 127, LARGEST)))
    while scale * 127 < largest and scale < LARGEST:
        scale = float(np.nextafter(np.float16(scale), np.float16(np.inf)))
    if scale == 0:
        return [0] * len(token), 0.0
    return [max(-127, min(127, round(float(value) / scale))) for value in token], scale  # halves go to even


@pytest.mark.parametrize("factor", [1, 1e-3, 1e3, 6e-6, 1e-9, 8e6, 1e30])
def test_int8_equals_the_slow_reference(factor):
    tokens = (np.random.default_rng(0).normal(size=(6, 5, 16)) * factor).astype("float32")
    tokens[0, 0] = 0
    tokens[0, 1, 1:] = 0
    tokens[0, 2] = tokens[0, 2, 0]
    stored = encode_dense(tokens, "int8")
    assert {name: (array.shape, array.dtype.name) for name, array in stored.items()} == {
        "dense_tokens": ((6, 5, 16), "int8"), "dense_scales": ((6, 5), "float16"),
    }  # fmt: skip
    for place in np.ndindex(6, 5):
        codes, scale = slow_int8(tokens[place])
        assert stored["dense_scales"][place] == scale
        # A quotient of float32 may fall on the other side of a half.
        assert np.abs(stored["dense_tokens"][place] - codes).max() <= (0 if factor == 1e30 else 1)
    assert np.isfinite(stored["dense_scales"]).all()


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1, 1e3, 1e6])
def test_int8_is_off_by_half_a_scale_at_most(factor):
    tokens = (np.random.default_rng(1).standard_t(2, size=(50, 64)) * factor).astype("float32")
    tokens = np.clip(tokens, -127 * LARGEST, 127 * LARGEST)
    stored = encode_dense(tokens, "int8")
    decoded = decode_dense(stored)
    assert decoded.dtype == np.float32
    scales = stored["dense_scales"].astype("float32")[:, None]
    assert (np.abs(decoded - tokens) <= 0.5001 * scales).all()
    tight = np.abs(tokens).max(axis=1) / 127
    assert (scales[:, 0] <= tight * 1.002 + 6e-8).all(), "a scale that is larger than need be loses precision"


def test_zero_tokens_stay_zero_and_give_no_warning():
    tokens = np.zeros((3, 4), "float32")
    with np.errstate(all="raise"):
        for encoding in ("float16", "int8"):
            np.testing.assert_array_equal(decode_dense(encode_dense(tokens, encoding)), tokens)


@pytest.mark.parametrize("encoding", ["float16", "int8", "pca-3"])
def test_huge_tokens_stay_finite(encoding):
    pca = random_pca(8, 3) if encoding == "pca-3" else None
    tokens = np.random.default_rng(0).normal(size=(9, 8)).astype("float32") * np.float32(1e20)
    with np.errstate(over="raise", invalid="raise"):
        decoded = decode_dense(encode_dense(tokens, encoding, pca), pca)
    assert np.isfinite(decoded).all()
    if encoding != "pca-3":
        assert (np.sign(decoded) == np.sign(tokens))[np.abs(tokens) > 1e19].all()


def test_float16_is_rounding_alone():
    tokens = np.random.default_rng(0).normal(size=(2, 3, 3, 16)).astype("float32") * 10
    (stored,) = encode_dense(tokens, "float16").values()
    np.testing.assert_array_equal(stored, tokens.astype("float16"), strict=True)
    decoded = decode_dense({"dense_tokens": stored})
    np.testing.assert_array_equal(decoded, stored.astype("float32"), strict=True)
    assert encode_dense(tokens, "none") == {}


def test_pca_keeps_what_lies_in_its_plane_and_drops_the_rest():
    pca = random_pca(8, 3)
    random = np.random.default_rng(1)
    within = (random.normal(size=(2, 5, 3)) @ pca.components + pca.mean).astype("float32")
    stored = encode_dense(within, "pca-3", pca)
    assert stored["dense_tokens"].shape == (2, 5, 3) and stored["dense_tokens"].dtype == np.float16
    np.testing.assert_allclose(decode_dense(stored, pca), within, atol=5e-3)
    others = np.linalg.svd(pca.components)[2][3:]  # orthogonal to the plane
    off = (within + random.normal(size=(2, 5, 5)) @ others).astype("float32")
    np.testing.assert_allclose(decode_dense(encode_dense(off, "pca-3", pca), pca), within, atol=1e-2)


def test_pca_size():
    assert [pca_size(name) for name in ("none", "float16", "int8", "pca-7")] == [None, None, None, 7]
    assert array_specs(8, 2, 5, 3, "pca-7")["dense_tokens"].tail == (2, 2, 7)
    for size in (8, 9, 300):
        with pytest.raises(UserError, match=rf"storage.dense_tokens pca-{size}: .* C = 8 values: choose K below 8"):
            array_specs(8, 2, 5, 3, f"pca-{size}")


@pytest.fixture
def encoded(stage_one):
    """encoded(encoding, ...) -> a finished stage one whose dense tokens are those of random ones, and these."""

    def make(encoding, directory="cache", seed=0, run=True):
        stage = stage_one(directory, dense=encoding)
        tokens = np.random.default_rng(2).normal(size=(8, VIEWS, GRID, GRID, WIDTH)).astype("float32")
        stage.pca = random_pca(WIDTH, 2, seed) if encoding.startswith("pca") else None
        stage.arrays |= encode_dense(tokens, encoding, stage.pca)
        stage.create = lambda: create_cache(
            stage.location, stage.manifest, stage.image_ids, stage.text_features, stage.pca
        )
        if run:
            stage.run()
        return stage, tokens

    return make


@pytest.mark.parametrize(("encoding", "tolerance"), [("float16", 2e-3), ("int8", 0.02), ("pca-2", None)])
def test_the_cache_gives_them_decoded(encoded, encoding, tolerance):
    stage, tokens = encoded(encoding)
    assert verify(stage.path) == []
    cache = open_cache(stage.path)
    assert ("dense_scales" in cache.names) == (encoding == "int8")
    for row in range(8):
        found = cache.dense_tokens(row)
        assert found.shape == (VIEWS, GRID, GRID, WIDTH) and found.dtype == np.float32
        if tolerance:
            np.testing.assert_allclose(found, tokens[row], atol=tolerance)
        else:
            stored = {"dense_tokens": cache.read("dense_tokens", row)}
            np.testing.assert_array_equal(found, decode_dense(stored, stage.pca))
    with pytest.raises(IndexError):
        cache.dense_tokens(8)


def test_a_cache_without_them_says_so(stage_one):
    with pytest.raises(UserError, match="has no dense_tokens"):
        open_cache(stage_one(dense="none").run()).dense_tokens(0)


@pytest.mark.parametrize("file", PCA_FILES)
def test_the_pca_is_kept_twice_and_restored(encoded, file):
    stage, _ = encoded("pca-2")
    before = stage.tree()
    for lost in (file, copy_key(file)):
        (stage.path / lost).write_bytes(b"damaged")
        np.testing.assert_array_equal(stored_pca(stage.path).components, stage.pca.components, strict=True)
        np.testing.assert_array_equal(stored_pca(stage.path).mean, stage.pca.mean, strict=True)
        prepare_repair(stage.path)
        assert stage.tree() == before
    for lost in (file, copy_key(file)):
        (stage.path / lost).write_bytes(b"damaged")
    assert stored_pca(stage.path) is None
    with pytest.raises(UserError, match=f"{file} is missing or does not match the manifest: run cache repair"):
        open_cache(stage.path)
    stage.run()  # fitted anew, to the same bytes
    assert stage.tree() == before


def test_another_machines_pca_cannot_replace_a_lost_one(encoded):
    stage, _ = encoded("pca-2")
    for lost in (PCA_FILES[1], copy_key(PCA_FILES[1])):
        (stage.path / lost).unlink()
    stage.pca = random_pca(WIDTH, 2, seed=9)
    with pytest.raises(UserError, match=r"pca_components/c.0.0 and its copy are damaged, and this machine computes"):
        stage.create()


def test_the_first_pca_stays_when_views_are_added(encoded, stage_one):
    stage, _ = encoded("pca-2")
    first = stage.pca
    assert stored_pca(stage.path.with_name("nowhere")) is None
    stage.manifest = stage.manifest.model_copy(update={"views": 4})
    stage.pca = random_pca(WIDTH, 2, seed=9)
    stage.create()
    np.testing.assert_array_equal(stored_pca(stage.path).components, first.components)
    assert stored_pca(stage_one("plain").run()) is None


def test_no_file_is_read_for_the_pca_of_a_cache_without(stage_one, monkeypatch):
    stage = stage_one()
    stage.run()
    store = type(open_store(stage.path))
    monkeypatch.setattr(store, "read_many", lambda *_: pytest.fail("read"))
    assert issubclass(store, Store) and stored_pca(stage.path) is None
