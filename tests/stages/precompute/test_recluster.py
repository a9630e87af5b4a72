"""precompute --only pseudo-labels: labels from a cache's dense tokens, through the front door, without a teacher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import cache.writer
import stages.precompute.recluster
from cache.dense import Pca, encode_dense, pca_size
from cache.manifest import Manifest
from cache.reader import Cache, open_cache
from cache.store import open_store
from cache.verify import verify
from cache.writer import create_cache, relink, write_shard
from cli import app
from configs.errors import UserError
from configs.load import resolve
from configs.schema import PseudoLabels
from pipeline.pseudo_labels import pseudo_labels
from pipeline.pseudo_labels.regions import region_tokens
from stages.common.caches import split_settings
from stages.common.datasets import open_split
from stages.precompute.stage import cache_settings
from stages.train.provenance import last_cache
from tests.conftest import ROOT, World, write_world

IMAGES, VIEWS, GRID, WIDTH = 10, 2, 8, 16
GROUPS = 2 * 2 + 3 * 3  # windows of 3 and 2 on the grid
SETTINGS = ("views.crop=random", f"views.count={VIEWS}", "pseudo_labels.windows=[3, 2]")
SKIPPED = 5  # an image that could not be read


def settings_of(world: World, *settings: str):  # type: ignore[no-untyped-def]
    return resolve(config=world.config, assignments=[*SETTINGS, *settings])


def write_source(world: World, location: Path, *settings: str, views: int = VIEWS) -> Cache:
    """A cache as stage one leaves it, but of random tokens: few directions, so that lambda matters."""
    from cache.layout import array_specs

    config = settings_of(world, *settings)
    dataset = open_split(config.dataset, world.data, "train")
    storage = config.storage
    specs = array_specs(WIDTH, GRID, GROUPS, storage.shard_images, storage.dense_tokens, storage.dense_views)
    manifest = Manifest.describe(
        cache_settings(config.stage_one, dataset), {"torch": "1"}, dataset.ids, views, storage.shard_images, specs,
        context={**split_settings(config.stage_one)[1], "precompute": {"batch_size": 3}},
    )  # fmt: skip
    random = np.random.default_rng(0)
    components = np.linalg.qr(np.random.default_rng(1).normal(size=(WIDTH, WIDTH)))[0][: pca_size(storage.dense_tokens)]
    pca = Pca(np.full(WIDTH, 0.1, "f4"), components.astype("f4")) if pca_size(storage.dense_tokens) else None
    text = np.eye(len(config.dataset.classes), WIDTH, dtype="f4")
    manifest = create_cache(location, manifest, dataset.ids, text, pca)
    tokens = random.normal(size=(IMAGES, 4, GRID, GRID, WIDTH)).astype("float32")
    tokens += 2 * random.normal(size=(6, WIDTH))[random.integers(0, 6, (IMAGES, 4, GRID, GRID))].astype("float32")
    annotated = random.random((IMAGES, 4, GRID, GRID)) < 0.3
    annotated[3] = annotated[SKIPPED] = True
    arrays = {
        "cls_tokens": random.normal(size=(IMAGES, 4, WIDTH)).astype("float16"),
        "views": np.tile(np.array([0, 0, 1, 1, 0], "float32"), (IMAGES, 4, 1)),
        "pseudo_labels": np.where(annotated, 255, 0).astype("uint8"),
        "kmeans_labels": np.where(annotated, 255, 1).astype("uint8"),
        "region_tokens": np.full((IMAGES, 4, GROUPS, WIDTH), 99, "int8"),  # not to be taken over
        **encode_dense(tokens, storage.dense_tokens, pca),
    }
    for index, first_view in cache.writer.pending(location):
        start, stop = manifest.shard_rows(index)
        block = {name: arrays[name][start:stop, first_view : specs[name].stored_views(views)] for name in specs}
        why = {"train-5": "images/train-5.png is truncated"} if start <= SKIPPED < stop else {}
        write_shard(location, index, first_view, block, why)
    return open_cache(location)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A world as the working directory, with the source at caches/source; loading a teacher fails, so does Dask."""
    made = write_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr("pipeline.teacher.clip.load", lambda *_: pytest.fail("the teacher was loaded"))
    monkeypatch.setattr("stages.precompute.stage.workers", lambda *_: pytest.fail("workers were started"))
    write_source(made, tmp_path / "caches" / "source")
    return made


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def refusal(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert isinstance(done.exception, UserError), (done.output, done.exception)
    assert "\n" not in str(done.exception)
    return str(done.exception)


def only(*arguments: str) -> Path:
    """The cache that is made."""
    before = set(Path("caches").glob("tiny-*"))
    run("precompute", "--only", "pseudo-labels", *arguments)
    (made,) = set(Path("caches").glob("tiny-*")) - before
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_labels_are_those_of_the_tokens(made: Cache, source: Cache, threshold: float) -> int:
    """And region tokens those of these labels; how many groups there are in all."""
    found, views = 0, made.manifest.views
    config = PseudoLabels(windows=(3, 2), **{"lambda": threshold})
    assert made.manifest.kmeans == "faiss"
    for row in range(IMAGES):
        tokens = torch.from_numpy(source.dense_tokens(row)[:views])
        free = source.read("pseudo_labels", row)[:views] == 0
        clusters, groups = pseudo_labels(tokens, free, config, "faiss")
        np.testing.assert_array_equal(made.read("pseudo_labels", row), groups)
        np.testing.assert_array_equal(made.read("kmeans_labels", row), clusters)
        found += sum(len(np.unique(view)) for view in groups)
        regions = region_tokens(tokens, groups, GROUPS)
        np.testing.assert_array_equal(made.read("region_tokens", row), regions, strict=True)
        assert regions.any() == (groups < 255).any()
    return found


def test_labels_are_those_of_the_stored_tokens(here: World) -> None:
    source = open_cache("caches/source")
    before = contents(Path("caches/source"))
    groups = {}
    for threshold in (0.9, 0.3):
        path = only("--lambda", str(threshold), "--cache", "caches/source")
        made = open_cache(path)
        settings = {"windows": [3, 2], "iterations": 10, "lambda": threshold}
        assert made.manifest.settings["pseudo_labels"].items() >= settings.items()
        assert path.name == f"tiny-{made.manifest.fingerprint[:12]}"
        groups[threshold] = assert_labels_are_those_of_the_tokens(made, source, threshold)
        for name in ("cls_tokens", "dense_tokens", "views"):
            np.testing.assert_array_equal(made.load(name), source.load(name), strict=True)
            assert not (path / "arrays" / name).exists()
        assert made.skipped() == source.skipped() == made.manifest.skipped and SKIPPED not in made.kept_rows
        assert verify(path) == []
    assert groups[0.9] > groups[0.3], "lambda must matter here"
    assert contents(Path("caches/source")) == before
    assert "dense_tokens: in " in run("cache", "info", str(path))


def test_by_default_the_newest_cache_and_of_labels_alone_the_one_they_were_made_from(here: World) -> None:
    first = only("--lambda", "0.9")
    time.sleep(0.01)
    second = only("--set", "pseudo_labels.iterations=3")  # on the first, which is the newest now
    made = open_cache(second).manifest
    assert made.settings["pseudo_labels"].items() >= {"windows": [3, 2], "iterations": 3, "lambda": 0.9}.items()
    assert made.borrowed == open_cache(first).manifest.borrowed
    assert set(made.borrowed) == {"cls_tokens", "dense_tokens", "views"}
    for lent in made.borrowed.values():
        assert lent.cache == "../source"
    whole = contents(first)
    run("precompute", "--only", "pseudo-labels", "--lambda", "0.9", "--cache", "caches/source")
    assert contents(first) == whole


def test_a_killed_one_is_continued_and_a_damaged_one_repaired(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    path = only("--lambda", "0.9")
    whole = contents(path)
    for record in ("00000.json", "00002.json"):
        (path / "shards" / record).unlink()
    made = []
    make = stages.precompute.recluster.make_labels
    monkeypatch.setattr(stages.precompute.recluster, "make_labels", lambda *job: made.append(job[4]) or make(*job))
    run("precompute", "--only", "pseudo-labels", "--lambda", "0.9")
    assert contents(path) == whole and made == [0, 2]
    shard = path / "arrays" / "pseudo_labels" / "c.1.1.0.0"
    shard.write_bytes(b"damaged")
    (path / "manifest.json").unlink()
    assert f"changed: {path}/arrays/pseudo_labels/c.1.1.0.0" in run("cache", "repair", str(path))
    assert contents(path) == whole and made == [0, 2, 1]
    assert "nothing to do" in run("precompute", "--only", "pseudo-labels", "--lambda", "0.9")
    assert contents(path) == whole and made == [0, 2, 1]


def test_killed_by_the_system(here: World) -> None:
    """SIGKILL of the command as soon as something is there; the same command ends at the same bytes."""
    path = only("--lambda", "0.9")
    whole = contents(path)
    path.rename(path.with_name("whole"))
    command = [sys.executable, str(ROOT / "cli.py"), "precompute", "--only", "pseudo-labels", "--lambda", "0.9"]
    command += ["--cache", "caches/source"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(path.glob("shards/*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.exists()
    run("precompute", "--only", "pseudo-labels", "--lambda", "0.9", "--cache", "caches/source")
    assert {key: data for key, data in contents(path).items() if not key.endswith((".tmp", ".lock"))} == whole


def test_views_that_the_source_gets_later(here: World) -> None:
    path = only("--lambda", "0.9")
    old = open_cache(path).load("pseudo_labels")
    write_source(here, Path("caches/source").absolute(), views=4)
    assert open_cache(path).dense_tokens(0).shape[0] == 2
    run("precompute", "--only", "pseudo-labels", "--lambda", "0.9", "--cache", "caches/source")
    made = open_cache(path)
    assert made.manifest.views == 4 and verify(path) == []
    np.testing.assert_array_equal(made.load("pseudo_labels")[:, :2], old)
    assert_labels_are_those_of_the_tokens(made, open_cache("caches/source"), 0.9)


@pytest.mark.parametrize("encoding", ["int8", "pca-5", "none"])
def test_other_encodings_and_fewer_views(here: World, encoding: str) -> None:
    settings = (f"storage.dense_tokens={encoding}", "storage.dense_views=1")
    source = write_source(here, here.folder / "caches" / "other", *settings)
    if encoding == "none":
        message = refusal("precompute", "--only", "pseudo-labels", "--cache", "caches/other")
        assert "caches/other has no dense tokens, which new labels need: precompute with --set" in message
        return
    made = open_cache(only("--cache", "caches/other", "--lambda", "0.7"))
    assert made.manifest.views == 1 and "dense_tokens" in made.manifest.borrowed
    assert ("dense_scales" in made.manifest.borrowed) == (encoding == "int8")
    assert made.load("views").shape[1] == 1
    assert_labels_are_those_of_the_tokens(made, source, 0.7)
    np.testing.assert_array_equal(made.dense_tokens(2), source.dense_tokens(2))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set", "teacher.dense=naclip"], "teacher.dense: cache \"clearclip\", asked \"naclip\""),
        (["--seed", "4"], "views.seed: cache 0, asked 4"),
        (["--set", "views.count=3"], "views.count: cache 2, asked 3"),
        (["--set", "storage.shard_images=5"], "storage.shard_images: cache 4, asked 5"),
        (["--set", "dataset.unseen=[heart]"], "dataset.unseen: cache"),
        (["--dry-run"], "drop --scheduler, --dry-run and --retry-skipped"),
        (["--retry-skipped"], "drop --scheduler, --dry-run and --retry-skipped"),
        (["--cache", "caches/nowhere"], "no cache at caches/nowhere"),
        (["--lambda", "2"], "pseudo_labels.lambda"),
        (["--set", f"pseudo_labels.windows={[1] * 30}"], "seeds on a grid of 8"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(here: World, arguments: list[str], says: str) -> None:
    assert says in refusal("precompute", "--only", "pseudo-labels", *arguments)


def test_a_source_that_is_another_cache_now(here: World) -> None:
    path = only("--lambda", "0.9")
    (path / "shards" / "00001.json").unlink()
    Path("caches/source").rename("caches/elsewhere")
    assert "no cache at" in refusal("cache", "repair", str(path))
    write_source(here, here.folder / "caches" / "source", "pseudo_labels.lambda=0.5")
    message = refusal("cache", "repair", str(path))
    assert "was made with other settings (files.dense_tokens: cache" in message


def arguments_of(path: Path) -> tuple[str, ...]:
    return ("--cache", str(path), *(f"--set={text}" for text in SETTINGS), "--set=pseudo_labels.lambda=0.9",
            "--set=train.iterations=2", "--set=loss.local=true")  # fmt: skip


def test_a_project_that_is_moved_is_used_as_it_is(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    path = only("--lambda", "0.9")
    config = ("--config", str(here.config))
    run("train", *config, *arguments_of(path.absolute()), "--run", "runs/one")
    moved = here.folder.with_name(f"{here.folder.name}-moved")
    moved.mkdir()
    for name in ("caches", "runs", "data"):
        (here.folder / name).rename(moved / name)
    monkeypatch.chdir(moved)
    run("cache", "verify", str(path))
    run("cache", "repair", str(path))
    run("precompute", "--only", "pseudo-labels", "--lambda", "0.9", "--cache", str(path))
    said = run("train", "--run", "runs/one")
    assert "is finished: nothing to do" in said or not said
    monkeypatch.chdir("/")
    assert last_cache(moved / "runs" / "one") == str(moved / path)


@pytest.mark.parametrize("stored", ["relative", "absolute"])
def test_a_lender_that_was_moved_is_pointed_at(here: World, stored: str) -> None:
    path = only("--lambda", "0.9")
    if stored == "absolute":  # as in caches made before
        manifest = open_cache(path).manifest
        old = {name: lent.model_copy(update={"cache": str(Path("caches/source").absolute())})
               for name, lent in manifest.borrowed.items()}  # fmt: skip
        relink(path, old)
        assert open_cache(path).manifest.borrowed == old
    whole = contents(path)
    Path("caches/source").rename("elsewhere")
    cure = f"if that cache was moved, run cache repair {path} --lender NEW_PLACE"
    for command in (("cache", "verify", str(path)), ("train", *arguments_of(path))):
        assert cure in refusal(*command)
    assert "source was moved, pass its new location as --lender" in refusal("cache", "repair", str(path))
    assert contents(path) == whole
    run("cache", "repair", str(path), "--lender", "elsewhere")
    run("cache", "verify", str(path))
    assert {lent.cache for lent in open_cache(path).manifest.borrowed.values()} == {"../../elsewhere"}
    assert "nothing to do" in run("precompute", "--only", "pseudo-labels", "--lambda", "0.9", "--cache", "elsewhere")


def test_verify_says_what_cannot_be_used(here: World) -> None:
    path = only("--lambda", "0.9")
    (path / "shards" / "00001.json").unlink()
    assert f"{path} is incomplete, 2 of 3 shards are done" in refusal("cache", "verify", str(path))


def test_training_on_it(here: World) -> None:
    path = only("--lambda", "0.9")
    run("train", "--cache", str(path), "--config", str(here.config), *(f"--set={s}" for s in SETTINGS),
        "--set=pseudo_labels.lambda=0.9", "--set=train.iterations=2", "--set=loss.local=true",
        "--run", "runs/one")  # fmt: skip
    assert (here.folder / "runs" / "one" / "student.safetensors").exists()
    assert open_store(path).exists("manifest.json")
