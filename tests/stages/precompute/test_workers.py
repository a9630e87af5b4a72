"""Stage one on Dask: whoever computes, the bytes are the same; what cannot be done is said in a line."""

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from dask.distributed import Client, KilledWorker, LocalCluster

import stages.precompute.workers
from cache.reader import open_cache
from cache.store import open_store
from configs.errors import UserError
from configs.load import resolve
from stages.precompute.stage import precompute
from stages.precompute.workers import for_all, on_a_worker, on_every_worker, workers
from tests.conftest import World, tree


@pytest.fixture
def here(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """Local workers are threads of this process, which start at once; the working directory is the world's."""
    monkeypatch.setattr(stages.precompute.workers, "LocalCluster", partial(LocalCluster, processes=False))
    monkeypatch.chdir(world.folder)
    return world


def test_a_running_scheduler_with_one_worker_gives_the_same_bytes(world: World, tmp_path: Path) -> None:
    """The scheduler and its worker are other processes than the one that asks them."""
    target = tmp_path / "remote"
    with LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=":0") as cluster:
        done = world.spawn(
            "precompute", "--config", world.config, "--cache", target, "--scheduler", cluster.scheduler_address
        )
    assert "dashboard: http" in done.stderr and "1 workers" in done.stderr
    assert tree(target) == tree(world.folder / "caches" / "tiny")


@pytest.mark.slow
def test_local_processes_make_the_same_bytes(world: World, tmp_path: Path) -> None:
    """The world's own cache was made by threads."""
    world.spawn("precompute", "--config", world.config, "--cache", tmp_path / "processes")
    assert tree(tmp_path / "processes") == tree(world.folder / "caches" / "tiny")


def test_timing_is_beside_the_cache(world: World) -> None:
    last = json.loads((world.folder / "caches" / "tiny" / "timing.json").read_text())[-1]
    assert last["views"] == 10 and last["workers"] == 2 and last["bottleneck"] in last["busy_seconds"]
    assert set(last["busy_seconds"]) == {"read", "teacher", "cluster", "write"}
    assert all(seconds > 0 for seconds in last["busy_seconds"].values())


def test_dry_run_plans_what_is_missing_and_writes_no_cache(here: World, tmp_path: Path, capsys) -> None:
    config = resolve(config=here.config)
    target = tmp_path / "cache"
    precompute(config, here.data, str(target), "cpu", dry_run=True)
    assert "plan: 10 views of 10 images in 3 shards; at most" in capsys.readouterr().err
    assert not target.exists()
    shutil.copytree(here.folder / "caches" / "tiny", target)
    (target / "shards" / "00002.json").unlink()
    before = tree(target)
    precompute(config, here.data, str(target), "cpu", dry_run=True)
    assert "plan: 2 views of 2 images in 1 shards; at most" in capsys.readouterr().err
    assert tree(target) == before


def test_what_cannot_fit_is_refused_before_anything_is_written(here: World, tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "cache"
    monkeypatch.setattr(type(open_store(target)), "free_bytes", lambda self: 10_000)
    with pytest.raises(UserError, match=r"has 10.0 kB free, and up to \d+.\d kB are needed"):
        precompute(resolve(config=here.config), here.data, str(target), "cpu")
    assert not target.exists()


def test_a_worker_that_outlived_its_run_writes_nothing(here: World, tmp_path: Path, monkeypatch) -> None:
    """Its run was killed, and another one holds the lock by now."""
    target = tmp_path / "cache"
    store = type(open_store(target))
    holders = iter(["the run that asked", *["another run"] * 9])
    monkeypatch.setattr(store, "holder", lambda self: next(holders))
    with pytest.raises(UserError, match="is now being written by another precompute"):
        precompute(resolve(config=here.config), here.data, str(target), "cpu")
    with pytest.raises(UserError, match="incomplete, 0 of 3 shards"):
        open_cache(target)


def test_no_scheduler_and_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.precompute.workers, "_PATIENCE", 1)
    for address in ("tcp://127.0.0.1:1", "nonsense://x"):
        with pytest.raises(UserError, match="no Dask scheduler answers there"), workers(address, "auto", 1):
            pass
    with LocalCluster(n_workers=0, processes=False, dashboard_address=":0") as cluster:
        address = cluster.scheduler_address
        with pytest.raises(UserError, match="has no workers"), workers(address, "auto", 1):
            pass


def _one_or_fail(number: int) -> int:
    if number == 3:
        raise UserError("three")
    return number


def _die(_: int) -> None:
    raise KilledWorker("task", SimpleNamespace(address="tcp://host:1"), 3)


def _lack(_: int) -> None:
    raise ModuleNotFoundError("No module named 'stages'")


def test_results_and_errors(here: World) -> None:
    with workers(None, "cpu", 2) as client:
        assert isinstance(client, Client)
        assert sorted(for_all(client, _one_or_fail, [0, 1, 2])) == [0, 1, 2]
        assert on_every_worker(client, _one_or_fail, 1) == [1, 1]
        with pytest.raises(UserError, match="three"):
            list(for_all(client, _one_or_fail, [1, 3]))
        with pytest.raises(UserError, match="died four times"):
            on_a_worker(client, _die, 0)
        with pytest.raises(UserError, match="install clip-zss where they run"):
            on_a_worker(client, _lack, 0)


def test_only_a_few_jobs_are_with_the_scheduler(here: World) -> None:
    drawn = []
    with workers(None, "cpu", 2) as client:
        found = for_all(client, _one_or_fail, (drawn.append(number) or number + 4 for number in range(50)))
        next(found)
        assert len(drawn) <= 2 * 4
        assert len(list(found)) == 49 and len(drawn) == 50


def test_a_run_without_workers_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.precompute.workers, "_PATIENCE", 0.2)
    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
        pytest.raises(UserError, match="no workers are left"),
    ):
        list(for_all(client, _one_or_fail, [1]))


@pytest.mark.parametrize("failures", [2, 3])
def test_workers_killed_while_they_start_are_started_again(monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    tries = []

    def start(**options: object) -> LocalCluster:
        tries.append(options)
        if len(tries) <= failures:
            raise RuntimeError("Nanny failed to start.")
        return LocalCluster(processes=False, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(stages.precompute.workers, "LocalCluster", start)
    if failures == 3:
        with pytest.raises(UserError, match=r"did not start in 3 tries \(Nanny failed"), workers(None, "cpu", 2):
            pass
    else:
        with workers(None, "cpu", 2) as client:
            assert on_every_worker(client, _one_or_fail, 1) == [1, 1]
    assert len(tries) == 3
