"""One writer at a time. Local folders use a lock on a file (cache/local_lock.py); object stores use a heartbeat.

The holder renews an object `.lock` from a thread; after a minute without renewal, another process can take the lock.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from configs.errors import UserError

LOCK = ".lock"  # no part of the cache
BEAT, STALE = 10.0, 60.0  # seconds: between renewals, and without one until the holder counts as dead
SETTLE = 1.0  # seconds between writing and reading back: of two simultaneous writers, the last one wins


class LockStore(Protocol):
    """The part of a store that a heartbeat needs; `create` writes a file unless it exists, and tells whether it did."""

    @property
    def location(self) -> str: ...
    def show(self, key: str) -> str: ...
    def read(self, key: str) -> bytes: ...
    def write(self, key: str, data: bytes) -> None: ...
    def create(self, key: str, data: bytes) -> bool: ...
    def delete(self, key: str) -> None: ...


def being_written(location: str, host: str, pid: str, cure: str) -> UserError:
    return UserError(f"{location} is being written by another precompute (host {host}, process {pid}): {cure}")


@contextmanager
def heartbeat(store: LockStore) -> Iterator[Callable[[], None]]:
    """Hold the lock while the block runs; UserError if another process holds it. Yields what `Store.lock` yields."""
    token = secrets.token_hex(16)
    _take(store, token)
    renewed, lost, stop = [time.monotonic()], threading.Event(), threading.Event()

    def renew() -> None:
        while not stop.wait(BEAT) and not lost.is_set():
            try:
                if holder_of(store).get("token") == token:
                    store.write(LOCK, _content(token))
                    renewed[0] = time.monotonic()
                else:
                    lost.set()
            except UserError:  # the store is out of reach, for now
                if time.monotonic() - renewed[0] > STALE:
                    lost.set()

    def check() -> None:
        if lost.is_set():
            raise UserError(f"the lock {store.show(LOCK)} was lost to another precompute: run the same command again")

    thread = threading.Thread(target=renew, name="cache lock", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        stop.set()
        thread.join()
        if holder_of(store).get("token") == token:
            store.delete(LOCK)


def _take(store: LockStore, token: str) -> None:
    holder = holder_of(store)
    if not holder and not store.create(LOCK, _content(token)):
        holder = holder_of(store)  # another process was quicker, or an answer was lost and it is ours
    if holder and holder.get("token") != token:
        if time.time() - holder["time"] < STALE:
            raise _refusal(store, holder)
        time.sleep(2 * BEAT)  # its clock may be wrong
        latest = holder_of(store)
        if latest != holder:
            raise _refusal(store, latest or holder)
        store.write(LOCK, _content(token))
    time.sleep(SETTLE)
    holder = holder_of(store)
    if holder.get("token") != token:
        raise _refusal(store, holder)


def _refusal(store: LockStore, holder: dict[str, Any]) -> UserError:
    cure = f"wait for it; if it died, try again in {STALE:.0f} s or delete {store.show(LOCK)}"
    return being_written(store.location, str(holder.get("host")), str(holder.get("pid")), cure)


def _content(token: str) -> bytes:
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "token": token, "time": time.time()}).encode()


def holder_of(store: LockStore) -> dict[str, Any]:
    """The holder as recorded in the lock; empty if there is none. An unreadable lock counts as not renewed."""
    for _ in range(5):
        try:
            content = json.loads(store.read(LOCK))
            return {**content, "time": float(content["time"])}
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError):
            time.sleep(0.03)  # the lock of a store that writes in place may just be written
    return {"host": "unknown", "pid": "unknown", "time": 0.0}
