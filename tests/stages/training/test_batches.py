"""What a training step reads: the cache's tokens and labels, or a live teacher's, beside the views' pixels."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cache.reader import Cache, open_cache
from configs.errors import UserError
from configs.load import resolve
from configs.schema import Config
from pipeline.data.dataset import SegmentationDataset
from pipeline.data.training import TrainingViews
from pipeline.data.views import draw_views, normalise
from stages.training import batches
from stages.training.batches import Batch, Batches
from stages.training.online import LiveTeacher
from tests.conftest import World

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
CROPS = ("views.crop=random", "views.count=3", "views.ratio=[0.5, 1.5]")


@pytest.fixture(scope="module")
def crops(world: World) -> str:
    """A cache of three random crops an image, some of them padded."""
    settings = [f"--set={setting}" for setting in CROPS]
    world.run("precompute", "--config", world.config, "--cache", "caches/cropped", *settings)
    return "caches/cropped"


def opened(world: World, cache: str, *settings: str) -> tuple[Config, Cache, SegmentationDataset]:
    config = resolve(config=world.config, assignments=[*CROPS, "train.iterations=8", *settings])
    return config, open_cache(world.folder / cache), SegmentationDataset(config.dataset, world.data, "train")


def read(world: World, cache: str, *settings: str, first: int = 0) -> list[Batch]:
    return [batch for (batch,) in Batches(*opened(world, cache, *settings), MEAN, STD, "cpu", first)]


def views_of(batch: Batch, cache: Cache) -> Iterator[tuple[int, list[int]]]:
    """Of each sample, its row and the views that have its tokens and labels."""
    tokens, groups = cache.load("cls_tokens"), cache.load("pseudo_labels")
    for row, own_tokens, own_groups in zip(batch.rows.tolist(), batch.cls_tokens, batch.groups, strict=True):
        views = range(tokens.shape[1])
        found = [v for v in views if (tokens[row, v] == own_tokens.numpy()).all()]
        yield row, [v for v in found if (groups[row, v] == own_groups.numpy()).all()]


def test_batches_are_the_samples_in_order_with_what_the_cache_holds(world: World, crops: str) -> None:
    _, cache, dataset = opened(world, crops)
    samples = TrainingViews(dataset, cache.kept_rows, cache.load("views"), 64, 32, 0, MEAN)
    found = read(world, crops)
    assert len(found) == 8
    for index, batch in enumerate(found):
        expected = [samples[4 * index + place] for place in range(4)]
        pixels = normalise(np.stack([sample["pixels"] for sample in expected]), MEAN, STD)
        assert torch.equal(batch.pixels, pixels) and batch.pixels.is_contiguous(memory_format=torch.channels_last)
        np.testing.assert_array_equal(batch.seen, np.stack([sample["seen"] for sample in expected]), strict=True)
        assert batch.cls_tokens.dtype == torch.float32 and batch.groups.dtype == torch.uint8
        for sample, (row, views) in zip(expected, views_of(batch, cache), strict=True):
            assert sample["row"] == row and sample["view"] in views


def test_a_run_goes_on_where_it_was(world: World, crops: str) -> None:
    whole, rest = read(world, crops), read(world, crops, first=5)
    assert len(rest) == 3
    for one, other in zip(whole[5:], rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_fewer_views_than_the_cache_holds(world: World, crops: str) -> None:
    for batch in read(world, crops, "views.count=2"):
        assert all({0, 1} & set(views) for _, views in views_of(batch, open_cache(world.folder / crops)))


def test_a_live_teacher_says_what_the_cache_holds(world: World, crops: str) -> None:
    """To float16's rounding, in batches of another size than stage one's; pixels and seen masks are the same."""
    cached, online = read(world, crops), read(world, crops, "train.teacher=online")
    padded = open_cache(world.folder / crops).load("views")[..., 2:4].max() > 1
    assert padded and len(cached) == len(online) == 8
    for one, other in zip(cached, online, strict=True):
        for name in ("pixels", "seen", "rows", "groups"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        torch.testing.assert_close(one.cls_tokens, other.cls_tokens, rtol=2**-11, atol=2e-6)
        assert not torch.equal(one.cls_tokens, other.cls_tokens)  # it is not read from the cache


@pytest.mark.parametrize("part", ["model", "pretrained"])
def test_a_live_teacher_is_the_one_that_made_the_cache(world: World, crops: str, part: str) -> None:
    config, cache, _ = opened(world, crops, "train.teacher=online")
    cache.manifest.settings["files"][part] = "of other bytes"
    with pytest.raises(UserError, match=rf"teacher.{part} .*tiny-vit.* has changed since .*cropped was made"):
        LiveTeacher(config, cache, "cpu")


def test_fresh_views_are_the_recorded_ones_first_and_new_ones_in_every_epoch(world: World, crops: str) -> None:
    settings = ("train.iterations=15", "train.batch_size=5", "train.teacher=fresh")  # 30 views: two and a half epochs
    recorded, fresh = read(world, crops, *settings[:2]), read(world, crops, *settings)
    same = [torch.equal(a.seen, b.seen) for a, b in zip(recorded, fresh, strict=True)]
    assert same[:6] == [True] * 6 and not any(same[6:])
    config, cache, dataset = opened(world, crops)
    sample = TrainingViews(dataset, cache.kept_rows, cache.load("views"), 64, 75, 0, MEAN)
    first, later = [{(sample[d]["row"], sample[d]["view"]) for d in span} for span in (range(30), range(30, 60))]
    assert first == later  # every image as often
    for row in range(3):
        seen = dataset.training_pair(row)[1]
        numbered = draw_views(config.views, dataset.ids[row], seen, [4, 0, 2])
        np.testing.assert_array_equal(numbered[1:], cache.load("views")[row, [0, 2]])
        assert not (numbered[0] == cache.load("views")[row]).all(axis=1).any()


def test_cached_and_online_losses_are_equal_to_the_rounding_of_the_cache(world: World, crops: str) -> None:
    """At every step of a training so slow that it does not amplify the rounding."""
    logs = {}
    for teacher in ("cached", "online"):
        run = world.folder / "runs" / teacher
        shutil.rmtree(run, ignore_errors=True)
        settings = [f"--set={setting}" for setting in (*CROPS, "train.lr=1e-8", f"train.teacher={teacher}")]
        world.run("train", "--cache", crops, "--config", world.config, "--run", run, *settings)
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        logs[teacher] = np.array([[line[name] for name in ("global", "bce", "nel", "ce", "total")] for line in lines])
    np.testing.assert_allclose(logs["online"], logs["cached"], rtol=2**-11)
    assert not np.array_equal(logs["online"], logs["cached"])


def test_only_the_wait_for_the_loader_counts_as_such(world: World, crops: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that stands still but for a second a sample and a hundred a teacher's pass."""
    now = [1000.0]
    monkeypatch.setattr(batches, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    sample = TrainingViews.__getitem__

    def slow(self: TrainingViews, draw: int) -> object:
        now[0] += 1
        return sample(self, draw)

    monkeypatch.setattr(TrainingViews, "__getitem__", slow)
    found = Batches(*opened(world, crops), MEAN, STD, "cpu")
    teach = found.teacher

    def slow_teacher(loaded: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        now[0] += 100
        return teach(loaded)

    found.teacher = slow_teacher
    asked = now[0]
    for _ in found:
        assert (found.asked, found.waited) == (asked, 4)
        now[0] += 10_000  # the student
        asked = now[0]


def test_every_step_says_how_long_it_took_and_waited(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "timing.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
    assert all(0 < line["waited"] < line["seconds"] for line in lines)  # without workers, reading is waiting


@pytest.mark.parametrize(("asked", "cores", "started"), [(0, 8, 0), (3, 8, 3), (8, 3, 3), (2, None, 1)])
def test_no_more_workers_than_cores(
    world: World, crops: str, monkeypatch: pytest.MonkeyPatch, asked: int, cores: int | None, started: int
) -> None:
    class Loader:
        def __init__(self, *_: object, num_workers: int, **__: object) -> None:
            assert num_workers == started

        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            return iter(())

    monkeypatch.setattr(batches, "DataLoader", Loader)
    monkeypatch.setattr(batches.os, "cpu_count", lambda: cores)
    assert read(world, crops, f"train.workers={asked}") == []
