"""Dask: starts workers on this machine or joins a running cluster, and distributes shards."""

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from multiprocessing import resource_tracker
from typing import Any, TypeVar

import dask
from dask.distributed import Client, Future, KilledWorker, LocalCluster, wait

from configs.errors import UserError
from stages.common.devices import local_workers
from stages.common.progress import say
from stages.precompute.shards import SHARDS_AT_ONCE

_T = TypeVar("_T")
_PATIENCE = 60  # seconds until a scheduler must have answered, and a first worker joined
_STARTS = 3  # of local workers: if one is killed while it starts, all of them fail
_SETTINGS = {
    "distributed.worker.profile.enabled": False,  # Dask would keep an hour of it in memory
    "distributed.worker.preload": ["stages.precompute.worker_signals"],  # or each would print a traceback at Ctrl-C
}
_JOBS_AHEAD = 2  # per thread of the workers: a cluster's scheduler need not hold every shard of a dataset


@contextmanager
def workers(scheduler: str | None, device: str, most: int) -> Iterator[Client]:
    """A client of the scheduler at this address, or of one started here with a worker per GPU or group of cores.

    Args:
        most: upper limit for local workers.

    Raises:
        UserError: no scheduler answers, or it has no workers.
    """
    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=_PATIENCE)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--scheduler {scheduler}: no Dask scheduler answers there: start one with `dask scheduler`, or "
                "correct the address, such as tcp://host:8786"
            ) from error
        with client:
            try:
                client.wait_for_workers(1, timeout=_PATIENCE)
            except TimeoutError as error:
                raise UserError(
                    f"--scheduler {scheduler} has no workers: start some with `dask worker {scheduler} --nthreads "
                    f"{SHARDS_AT_ONCE}`"
                ) from error
            say(f"dashboard: {client.dashboard_link}")
            yield client
        return
    with ExitStack() as stack:
        with _no_ctrl_c():
            cluster = stack.enter_context(_local_cluster(max(1, min(most, local_workers(device)))))
        client = stack.enter_context(Client(cluster))
        say(f"dashboard: {client.dashboard_link}")
        yield client


@contextmanager
def _no_ctrl_c() -> Iterator[None]:
    """Ctrl-C takes effect after the block; processes that start in it ignore Ctrl-C, and their parent stops them.

    A worker that is interrupted while it imports, before Dask's hooks, would print a traceback.
    """
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():  # no masks on Windows
        yield
        return
    noted: list[int] = []
    resource_tracker.ensure_running()  # if multiprocessing starts it later, it removes the mask
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # for this thread and everything it starts
    handler = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))  # older threads have no mask
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if noted:
        raise KeyboardInterrupt


def _local_cluster(count: int) -> LocalCluster:
    for attempt in range(_STARTS):
        try:
            with dask.config.set(_SETTINGS):
                return LocalCluster(
                    n_workers=count,
                    threads_per_worker=SHARDS_AT_ONCE,
                    memory_limit=None,  # Dask would pause workers, although none of the memory is Dask's
                    dashboard_address=":0",  # any free port
                    silence_logs=logging.CRITICAL,
                )
        except RuntimeError as error:
            if attempt == _STARTS - 1:
                raise UserError(
                    f"the {count} Dask workers on this machine did not start in {_STARTS} tries ({error}): check "
                    "whether they run out of memory, or start them by hand and pass --scheduler"
                ) from error
    raise AssertionError


def worker_addresses(client: Client) -> list[str]:
    return list(client.scheduler_info(n_workers=-1)["workers"])


def on_every_worker(client: Client, task: Callable[[Any], _T], argument: object) -> list[_T]:
    """Run `task(argument)` once per worker, in parallel; if a worker is lost, another one runs its task."""
    futures = [
        client.submit(task, argument, workers=[address], allow_other_workers=True, pure=False)
        for address in worker_addresses(client)
    ]
    return [_result(client, future) for future in futures]


def on_a_worker(client: Client, task: Callable[..., _T], *arguments: object) -> _T:
    return _result(client, client.submit(task, *arguments, pure=False))


def for_all(client: Client, task: Callable[[Any], _T], jobs: Iterable[object]) -> Iterator[_T]:
    """Yield results as they arrive. If a worker dies, its job is retried on another one, up to three times.

    Raises:
        UserError: a job's workers died four times, or no workers are left. Exceptions of the task are passed on.
    """
    waiting, running = iter(jobs), set[Future[Any]]()
    while True:
        room = _JOBS_AHEAD * sum(client.nthreads().values()) - len(running)
        running |= {client.submit(task, job, pure=False) for job in islice(waiting, max(room, not running))}
        if not running:
            return
        done = _first_done(client, running)
        running -= done
        for future in done:
            yield _value(future)


def _first_done(client: Client, running: set[Future[Any]]) -> set[Future[Any]]:
    while True:
        try:
            return set(wait(running, timeout=_PATIENCE, return_when="FIRST_COMPLETED").done)
        except TimeoutError:
            if not client.nthreads():
                raise UserError(
                    "no workers are left, and no new ones have joined: run the same command again to continue"
                ) from None


def _result(client: Client, future: Future[Any]) -> Any:
    _first_done(client, {future})
    return _value(future)


def _value(future: Future[Any]) -> Any:
    try:
        return future.result()
    except KilledWorker as error:
        raise UserError(
            "the workers of one task died four times (out of memory?): lower storage.shard_images or "
            "precompute.batch_size, or check the workers' logs; then run the same command again to continue"
        ) from error
    except ModuleNotFoundError as error:
        raise UserError(f"the workers lack a package ({error}): install clip-zss where they run") from error
