"""Dask: worker processes of this machine, or a cluster that is there already, and shards handed out to them."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from dask.distributed import Client, KilledWorker, LocalCluster, as_completed

from configs.errors import UserError
from stages.devices import local_workers
from stages.progress import say
from stages.shards import SHARDS_AT_ONCE

_T = TypeVar("_T")
_PATIENCE = 60  # seconds until a scheduler must have answered, and a first worker joined


@contextmanager
def workers(scheduler: str | None, device: str, most: int) -> Iterator[Client]:
    """A client of the scheduler at this address, or of one started here with a worker per GPU or group of cores.

    Args:
        most: there is no use for more local workers.

    Raises:
        UserError: no scheduler answers, or it has no workers.
    """
    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=_PATIENCE)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--scheduler {scheduler}: no Dask scheduler answers there: start one by `dask scheduler`, or correct "
                "the address, such as tcp://host:8786"
            ) from error
        with client:
            try:
                client.wait_for_workers(1, timeout=_PATIENCE)
            except TimeoutError as error:
                raise UserError(
                    f"--scheduler {scheduler} has no workers: start some by `dask worker {scheduler} --nthreads "
                    f"{SHARDS_AT_ONCE}`"
                ) from error
            say(f"dashboard: {client.dashboard_link}")
            yield client
        return
    with (
        LocalCluster(
            n_workers=max(1, min(most, local_workers(device))),
            threads_per_worker=SHARDS_AT_ONCE,
            memory_limit=None,  # Dask would pause a worker that it cannot relieve: none of the memory is Dask's
            dashboard_address=":0",  # any free port
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
    ):
        say(f"dashboard: {client.dashboard_link}")
        yield client


def worker_addresses(client: Client) -> list[str]:
    return list(client.scheduler_info(n_workers=-1)["workers"])


def on_every_worker(client: Client, task: Callable[[Any], _T], argument: object) -> list[_T]:
    """`task(argument)` once for each worker, at the same time: on it, or on another one should it be lost."""
    futures = [
        client.submit(task, argument, workers=[address], allow_other_workers=True, pure=False)
        for address in worker_addresses(client)
    ]
    return [_result(future) for future in futures]


def on_a_worker(client: Client, task: Callable[..., _T], *arguments: object) -> _T:
    return _result(client.submit(task, *arguments, pure=False))


def for_all(client: Client, task: Callable[[Any], _T], jobs: Iterable[object]) -> Iterator[_T]:
    """The results, as they come. A job whose worker dies is given to another one, three times.

    Raises:
        UserError: a job's worker died four times. What the task raises.
    """
    for future in as_completed(client.map(task, list(jobs), pure=False)):
        yield _result(future)
        future.release()


def _result(future: Any) -> Any:
    try:
        return future.result()
    except KilledWorker as error:
        raise UserError(
            "the same shard's worker died four times (for want of memory?): lower storage.shard_images or "
            "precompute.batch_size, or look into the workers' logs; then run the same command again, it continues"
        ) from error
    except ModuleNotFoundError as error:
        raise UserError(f"the workers lack a package ({error}): install clip-zss where they run") from error
