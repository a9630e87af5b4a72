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
from stages.train import batches
from stages.train.batches import Batch, Batches
from stages.train.online import LiveTeacher
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


def equal(one: Batch, other: Batch) -> bool:
    pairs = zip([*one[:-1], *one.on_cpu], [*other[:-1], *other.on_cpu], strict=True)
    return all(torch.equal(a, b) if torch.is_tensor(a) and torch.is_tensor(b) else a is b for a, b in pairs)


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
    whole, rest = read(world, crops, "loss.local=true"), read(world, crops, "loss.local=true", first=5)
    assert len(rest) == 3 and rest[0].region_tokens is not None
    assert all(equal(one, other) for one, other in zip(whole[5:], rest, strict=True))


def test_region_tokens_come_where_the_loss_needs_them(world: World, crops: str) -> None:
    """Those of the row and the view, read by the loader, whole or in micro-batches; all else is as without them."""
    _, cache, dataset = opened(world, crops)
    samples = TrainingViews(dataset, cache.kept_rows, cache.load("views"), 64, 32, 0, MEAN)
    order = [(samples[d]["row"], samples[d]["view"]) for d in range(32)]
    stored = torch.from_numpy(cache.load("region_tokens"))
    expected = torch.stack([stored[place] for place in order])
    assert expected.any() and expected.shape == (32, 5, 16) and expected.dtype == torch.int8
    without, found = read(world, crops, "loss.local=false"), read(world, crops, "loss.local=true")
    for one, other in zip(without, found, strict=True):
        assert one.region_tokens is None and equal(one, other._replace(region_tokens=None))
    assert torch.equal(torch.cat([batch.region_tokens for batch in found]), expected)  # type: ignore[misc]
    halves = Batches(*opened(world, crops, "loss.local=true", "train.accumulate=2"), MEAN, STD, "cpu")
    steps = [torch.stack([part.region_tokens for part in parts]) for parts in halves]
    assert torch.equal(torch.stack(steps), expected.view(8, 2, 2, 5, 16))


def test_a_group_that_is_there_has_a_region_token_and_no_other(world: World, crops: str) -> None:
    for teacher in ("cached", "online", "fresh"):
        for batch in read(world, crops, "loss.local=true", f"train.teacher={teacher}"):
            assert batch.region_tokens is not None and batch.region_tokens.dtype == torch.int8
            for groups, tokens in zip(batch.groups, batch.region_tokens, strict=True):
                there = [group for group in groups.unique().tolist() if group != 255]
                assert tokens.any(dim=1).nonzero()[:, 0].tolist() == there


def test_damaged_region_tokens_are_one_line(world: World, crops: str, tmp_path: Path) -> None:
    """Also from a loader's worker, which wraps what it meets in its traceback. Until they are read nobody knows."""
    shutil.copytree(world.folder / crops, tmp_path / "cache")
    for file in (tmp_path / "cache").glob("arrays/region_tokens/c.*"):
        file.write_bytes(file.read_bytes()[:-9])
    assert len(read(world, str(tmp_path / "cache"), "loss.local=false")) == 8
    for workers in (0, 1):
        damaged = Batches(
            *opened(world, str(tmp_path / "cache"), "loss.local=true", f"train.workers={workers}"), MEAN, STD, "cpu"
        )
        says = r"^.*/region_tokens/c\.\d\.\d\.0\.0 is missing or does not match .*: run cache repair, .*shard$"
        with pytest.raises(UserError, match=says) as error:
            next(iter(damaged))
        assert "\n" not in str(error.value)


def test_a_worker_reads_those_of_other_labels(world: World, crops: str) -> None:
    """Of a cache that shares all but what was made anew."""
    world.run("precompute", "--only", "pseudo-labels", "--cache", crops, "--set=pseudo_labels.lambda=0.99")
    (made,) = (world.folder / "caches").glob("tiny-*")
    opening = opened(world, str(made), "loss.local=true", "train.workers=1")
    regions = torch.from_numpy(opening[1].load("region_tokens"))
    assert not torch.equal(regions, torch.from_numpy(open_cache(world.folder / crops).load("region_tokens")))
    loader = Batches(*opening, MEAN, STD, "cpu")
    (batch,) = next(iter(loader))
    loader.close()
    assert batch.region_tokens is not None
    for row, tokens in zip(batch.rows.tolist(), batch.region_tokens, strict=True):
        assert any(torch.equal(tokens, own) for own in regions[row])


def test_fewer_views_than_the_cache_holds(world: World, crops: str) -> None:
    for batch in read(world, crops, "views.count=2"):
        assert all({0, 1} & set(views) for _, views in views_of(batch, open_cache(world.folder / crops)))


def test_a_live_teacher_says_what_the_cache_holds(world: World, crops: str) -> None:
    """To float16's rounding, in batches of another size than stage one's; pixels and seen masks are the same."""
    cached = read(world, crops, "loss.local=true")
    online = read(world, crops, "loss.local=true", "train.teacher=online")
    padded = open_cache(world.folder / crops).load("views")[..., 2:4].max() > 1
    assert padded and len(cached) == len(online) == 8
    for one, other in zip(cached, online, strict=True):
        for name in ("pixels", "seen", "rows", "groups"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert one.region_tokens is not None and other.region_tokens is not None
        torch.testing.assert_close(one.region_tokens.int(), other.region_tokens.int(), rtol=0, atol=1)
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

    def slow_teacher(loaded: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
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
