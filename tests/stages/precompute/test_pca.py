"""Stage one with dense tokens that are not float16: what the shards hold, and the PCA that is fitted before them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache.dense import Pca, decode_dense, encode_dense
from cache.manifest import Manifest
from cache.reader import open_cache
from cache.store import open_store
from cache.verify import verify
from cache.writer import create_cache, stored_pca
from configs.errors import UserError
from configs.load import as_settings, resolve
from pipeline.data.dataset import BrokenFile
from stages.precompute.pca import fit_dense_pca
from stages.precompute.shards import ShardJob, describe, make_shard, worker_of
from tests.conftest import World, tree, write_world


@pytest.fixture(scope="module")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


def job_of(world: World, encoding: str, cache: Path, *settings: str) -> ShardJob:
    config = resolve(config=world.config, assignments=[f"storage.dense_tokens={encoding}", *settings])
    store = open_store(cache)
    return ShardJob(
        settings=json.dumps(as_settings(config.stage_one)), precompute=config.precompute, data_root=world.data,
        device="cpu", fingerprint="", cache=str(cache), holder=store.holder(), index=0, first_view=0, start=0, stop=10,
    )  # fmt: skip


def precompute_here(world: World, encoding: str, cache: Path, pca: Pca | None = None) -> Pca | None:
    """What stages/precompute/stage.py does, here and with one shard; returns the PCA, by default a fitted one."""
    job = job_of(world, encoding, cache, "storage.shard_images=10")
    width, specs = describe(job)
    pca = pca or fit_dense_pca(job)
    ids = worker_of(job).dataset.ids
    manifest = Manifest.describe({"encoding": encoding}, {}, ids, 1, 10, specs)
    create_cache(cache, manifest, ids, np.zeros((3, width), np.float32), pca)
    with open_store(cache).lock():
        make_shard(replace(job, holder=open_store(cache).holder()))
    return pca


def teachers_tokens(world: World) -> np.ndarray:
    """(10, G, G, C) float32, one image at a time."""
    job = job_of(world, "float16", world.folder / "none")
    worker = worker_of(job)
    return np.concatenate([worker.encode(worker.batch(worker.views(job, row)[1]))[2].numpy() for row in range(10)])


@pytest.mark.parametrize("encoding", ["float16", "int8", "pca-5", "pca-15"])
def test_a_cache_holds_the_teachers_tokens_as_encoded(small_world: World, tmp_path: Path, encoding: str) -> None:
    pca = precompute_here(small_world, encoding, tmp_path / "cache")
    assert (pca is None) == (not encoding.startswith("pca"))
    cache = open_cache(tmp_path / "cache")
    tokens = teachers_tokens(small_world)
    found = np.concatenate([cache.dense_tokens(row) for row in range(10)])
    expected = decode_dense(encode_dense(tokens, encoding, pca), pca)
    step = 2 * np.abs(tokens).max() / 127 if encoding == "int8" else 2e-3 * np.abs(tokens).max()
    np.testing.assert_allclose(found, expected, atol=step)  # the teacher rounds otherwise in another batch
    lost = np.square(found - tokens).sum() / np.square(tokens - tokens.mean(axis=(0, 1, 2))).sum()
    assert lost < {"float16": 1e-5, "int8": 1e-3, "pca-5": 0.5, "pca-15": 0.02}[encoding]
    if encoding == "pca-5":
        assert lost > 1e-3, "five of sixteen directions cannot hold all"


def test_the_sample_is_of_first_views_of_all_images(small_world: World, tmp_path: Path) -> None:
    """With at most 64 images, the PCA is that of all tokens; twice the same bytes."""
    job = job_of(small_world, "pca-5", tmp_path / "cache")
    first, again = fit_dense_pca(job), fit_dense_pca(job)
    assert first is not None and again is not None
    assert first.mean.tobytes() == again.mean.tobytes() and first.components.tobytes() == again.components.tobytes()
    tokens = teachers_tokens(small_world).reshape(-1, 16).astype(float)
    np.testing.assert_allclose(first.mean, tokens.mean(axis=0), atol=1e-4)
    _, directions = np.linalg.eigh(np.cov(tokens.T))
    overlap = np.linalg.svd(first.components @ directions[:, -5:])[1]
    np.testing.assert_allclose(overlap, 1, atol=1e-3)


def test_a_large_sample_is_cut_down(small_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.precompute.pca.IMAGES", 4)
    monkeypatch.setattr("stages.precompute.pca.TOKENS", 50)
    seen = []
    monkeypatch.setattr(
        "stages.precompute.pca.fit_pca", lambda tokens, size: seen.append(tokens) or (tokens[0], tokens[:size])
    )
    for settings in ((), (), ("views.seed=1",)):
        fit_dense_pca(job_of(small_world, "pca-5", tmp_path / "cache", *settings))
    assert [tokens.shape for tokens in seen] == [(50, 16)] * 3
    assert (seen[0] == seen[1]).all() and not (seen[0] == seen[2]).all()
    tokens = teachers_tokens(small_world).reshape(10, 64, 1, 16)
    distance = np.abs(tokens - seen[0]).max(axis=-1)  # (10, 64, 50)
    of_image = distance.min(axis=1).argmin(axis=0)
    assert 1 < len(np.unique(of_image)) <= 4 and of_image.max() > 3 and distance.min(axis=(0, 1)).max() < 1e-3


def test_images_that_cannot_be_read(small_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(small_world, "pca-5", tmp_path / "cache")
    worker = worker_of(job)
    readable = worker.dataset.training_pair

    def training_pair(row: int) -> tuple[np.ndarray, np.ndarray]:
        if row != 4:
            raise BrokenFile(f"image {row} is truncated")
        return readable(row)

    monkeypatch.setattr(worker.dataset, "training_pair", training_pair)
    with pytest.raises(BrokenFile, match="is truncated"):
        fit_dense_pca(job)
    skip = replace(job, precompute=job.precompute.model_copy(update={"on_error": "skip"}))
    monkeypatch.setattr("stages.precompute.pca.worker_of", lambda _: worker)
    fitted = fit_dense_pca(skip)
    assert fitted is not None
    np.testing.assert_allclose(fitted.mean, teachers_tokens_of(worker, job, 4).mean(axis=0), atol=1e-4)
    monkeypatch.setattr(worker.dataset, "training_pair", lambda row: training_pair(row + 100))
    with pytest.raises(UserError, match="pca-5 is fitted on at least 16 tokens, and these images have 0"):
        fit_dense_pca(skip)


def teachers_tokens_of(worker, job: ShardJob, row: int) -> np.ndarray:  # type: ignore[no-untyped-def]
    return np.asarray(worker.encode(worker.batch(worker.views(job, row)[1]))[2]).reshape(-1, 16)


def test_what_is_stored_is_projected_by_the_caches_own_pca(small_world: World, tmp_path: Path) -> None:
    """The cache was begun on another machine, whose fit was another."""
    foreign = Pca(np.full(16, 0.5, np.float32), np.eye(16, dtype=np.float32)[3:8])
    precompute_here(small_world, "pca-5", tmp_path / "cache", foreign)
    cache = open_cache(tmp_path / "cache")
    tokens = teachers_tokens(small_world)
    for row in range(10):
        np.testing.assert_allclose(cache.read("dense_tokens", row)[0], tokens[row, ..., 3:8] - 0.5, atol=5e-3)
    found = stored_pca(tmp_path / "cache")
    assert found is not None and (found.components == foreign.components).all()


def test_two_runs_give_the_same_bytes_and_one_that_goes_on_fits_nothing(
    small_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("precompute", "--config", small_world.config, "--set", "storage.dense_tokens=pca-5", "--cache")
    caches = small_world.folder / "caches"
    for name in ("one", "two"):
        small_world.run(*command, f"caches/{name}")
    whole = tree(caches / "one")
    assert tree(caches / "two") == whole and "copies/arrays/pca_components/c.0.0" in whole
    assert verify(caches / "one") == []
    monkeypatch.setattr(
        "stages.precompute.stage.fit_dense_pca", lambda _: 1 / 0
    )  # pytest's own failure would hang Dask
    (caches / "one" / "shards" / "00001.json").unlink()
    (caches / "one" / "arrays" / "pca_mean" / "c.0").write_bytes(b"damaged")
    small_world.run(*command, "caches/one")
    assert tree(caches / "one") == whole
    line = small_world.fails(*command, "caches/new", "--set", "storage.dense_tokens=pca-16")
    assert "storage.dense_tokens pca-16: the teacher's tokens have only C = 16 values: choose K below 16" in line
    assert not (caches / "new" / "manifest.json").exists()
