"""Folders and object stores: the same bytes by the same keys, trouble told in one line, one writer at a time."""

import errno
import os
import signal
import socket
import time
from multiprocessing import get_context

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import cache.lock
import cache.url
from cache.lock import LOCK
from cache.reader import open_cache
from cache.store import absolute, open_store
from cache.verify import gc, prepare_repair, verify
from cache.writer import pending
from configs.errors import UserError


@pytest.fixture
def url():
    """A place of one's own in memory, which is one for the whole process."""
    MemoryFileSystem.store.clear()
    yield "memory://bucket/some/cache"
    MemoryFileSystem.store.clear()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(cache.url, "RETRY_DELAYS", (0.0, 0.0, 0.0))
    for name, seconds in (("BEAT", 0.02), ("STALE", 0.3), ("SETTLE", 0.01)):
        monkeypatch.setattr(cache.lock, name, seconds)


@pytest.fixture(params=["folder", "url"])
def store(request, tmp_path, url):
    return open_store(tmp_path / "cache" if request.param == "folder" else url)


def test_files_of_a_store(store):
    assert store.sizes() == {} and not store.exists("a/b")
    store.write("a/b", b"one")
    store.write("a/b", memoryview(b"three"))
    store.write("c", b"")
    assert (store.read("a/b"), store.read("c")) == (b"three", b"")
    assert store.read_many(["c", "nothing", "a/b"]) == {"c": b"", "a/b": b"three"} and store.read_many([]) == {}
    assert store.sizes() == {"a/b": 5, "c": 0}
    assert store.exists("a/b") and not store.exists("a") and not store.exists("a/b/c")
    store.delete("a/b")
    store.delete("a/b")
    assert store.sizes() == {"c": 0}
    with pytest.raises(FileNotFoundError):
        store.read("a/b")
    again = open_store(store.location)
    assert again.read("c") == b"" and again.show("a/b") == f"{store.location}/a/b"


def test_locations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("caches/x") == str(tmp_path / "caches/x") and absolute("s3://bucket/x") == "s3://bucket/x"
    assert open_store(f"file://{tmp_path}/x").location == f"{tmp_path}/x"
    with pytest.raises(UserError, match=r"nosuch://x is not a valid cache location \(.*\): correct --cache"):
        open_store("nosuch://x")


def test_an_object_store_holds_the_same_bytes(stage_one, url):
    local, remote = stage_one("local"), stage_one("unused", location=url)
    local.run()
    remote.run()
    store = open_store(url)
    assert {key: store.read(key) for key in store.sizes()} == local.tree()
    opened = open_cache(url)
    for name, array in local.arrays.items():
        np.testing.assert_array_equal(opened.load(name), array, strict=True)
        np.testing.assert_array_equal(opened.read(name, 7), array[7], strict=True)
        np.testing.assert_array_equal(opened.read(name, 7, 1), array[7, 1], strict=True)
    assert not remote.path.exists()


def test_an_object_store_is_verified_repaired_and_extended(stage_one, url):
    local, remote = stage_one("local", views=3), stage_one("unused", location=url)
    local.run()
    remote.run()
    store = open_store(url)
    for key in ("arrays/views/c.1.0.0", "image_ids.json", "shards/00002.json"):
        store.write(key, store.read(key)[:-1])
    store.delete("arrays/cls_tokens/c.0.1.0")
    store.write("arrays/more", b"123")
    assert {(damage.kind, damage.key, damage.shard) for damage in verify(url)} == {
        ("changed", "arrays/views/c.1.0.0", 1),
        ("changed", "image_ids.json", None),
        ("changed", "shards/00002.json", 2),
        ("missing", "arrays/cls_tokens/c.0.1.0", 0),
        ("stray", "arrays/more", None),
    }
    prepare_repair(url)
    assert pending(url) == [(0, 0), (1, 0), (2, 0)]
    remote.run()
    assert gc(url) == ([f"{url}/arrays/more"], 3)
    stage_one("unused", location=url, views=3).run()
    assert {key: store.read(key) for key in store.sizes()} == local.tree()


def failing(monkeypatch, method, times, error):
    """The memory file system's `method` fails so many times, then works; -> how often it was called."""
    calls, works = [], getattr(MemoryFileSystem, method)

    def fail(self, *args, **kwargs):
        calls.append(args)
        if len(calls) <= times:
            raise error
        return works(self, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, method, fail)
    return calls


@pytest.mark.parametrize("error", [OSError(errno.EIO, "internal error"), TimeoutError(), ConnectionResetError()])
def test_a_store_that_stumbles(url, impatient, monkeypatch, error):
    store = open_store(url)
    with monkeypatch.context() as patch:
        failing(patch, "pipe_file", 3, error)
        store.write("a", b"one")
    with monkeypatch.context() as patch:
        failing(patch, "cat_file", 3, error)
        assert store.read("a") == b"one"
    with monkeypatch.context() as patch:
        calls = failing(patch, "pipe_file", 4, error)
        with pytest.raises(UserError) as refusal:
            store.write("a", b"two")
        assert len(calls) == 4 and "\n" not in str(refusal.value)
        assert str(refusal.value).startswith(f"cannot write {url}/a (") and "try" not in str(refusal.value)
    assert store.read("a") == b"one"


def test_errors_that_no_waiting_mends(url, impatient, monkeypatch):
    calls = failing(monkeypatch, "pipe_file", 9, PermissionError("Access Denied"))
    with pytest.raises(UserError, match=r"cannot write .*/a \(Access Denied\): check the URL, the credentials and the"):
        open_store(url).write("a", b"")
    assert len(calls) == 1
    failing(monkeypatch, "cat_file", 9, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):  # a mistake of ours is not hidden
        open_store(url).read("a")


@pytest.mark.parametrize(
    ("number", "cure"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "choose another --cache")]
)
def test_full_and_read_only_disks(stage_one, monkeypatch, number, cure):
    stage, undisturbed = stage_one(), stage_one("undisturbed")
    stage.create()
    with monkeypatch.context() as patch:

        def fail(_):
            raise OSError(number, os.strerror(number))

        patch.setattr(os, "fsync", fail)
        with pytest.raises(UserError, match=rf"cannot write .*cls_tokens/c.0.0.0 \(.*\): .*{cure}"):
            stage.write(0)
    assert not list(stage.path.rglob("*.tmp"))
    stage.run()
    undisturbed.run()
    assert stage.tree() == undisturbed.tree()


def test_one_writer_at_a_time(store, impatient):
    with store.lock() as check:
        check()
        with pytest.raises(UserError) as refusal, open_store(store.location).lock():
            raise AssertionError
        me = f"(host {socket.gethostname()}, process {os.getpid()})"
        assert f"{store.location} is being written by another precompute {me}: wait for it" in str(refusal.value)
        assert store.sizes() == {}
        check()
    with store.lock():
        pass
    with pytest.raises(ZeroDivisionError), store.lock():
        raise ZeroDivisionError
    with store.lock():
        pass
    assert not store.exists(LOCK)


def hold(location, barrier):
    with open_store(location).lock():
        barrier.wait()
        time.sleep(60)


@pytest.mark.parametrize("protocol", ["", "local://"])
def test_a_killed_holder(tmp_path, impatient, protocol, monkeypatch):
    """Whose death the kernel tells at once; an object store, when it has been silent for a while."""
    monkeypatch.setattr(cache.lock, "STALE", 1.5)  # a busy machine may take a while from the kill to the next attempt
    location = f"{protocol}{tmp_path}"
    context = get_context("fork")
    barrier = context.Barrier(2)
    holder = context.Process(target=hold, args=(location, barrier))
    holder.start()
    barrier.wait(timeout=20)
    try:
        if protocol:
            time.sleep(2)  # it is older than STALE, and renewed
        with pytest.raises(UserError, match=rf"process {holder.pid}\)"), open_store(location).lock():
            raise AssertionError
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
    if protocol:
        with pytest.raises(UserError, match=r"if it died, try again in \d+ s or delete local://.*/.lock"):
            open_store(location).lock().__enter__()
        time.sleep(2)
    with open_store(location).lock():
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()


def test_only_one_of_many_gets_the_lock(tmp_path, in_processes, monkeypatch):
    """Six at once, again and again: the work of two never overlaps."""

    def work():
        store = open_store(tmp_path / "cache")
        done = 0
        while done < 5:
            try:
                with store.lock():
                    (tmp_path / "working").mkdir()  # fails if another is at it
                    (tmp_path / "working").rmdir()
                    done += 1
            except UserError:
                time.sleep(0.001)

    assert in_processes(*[work] * 6) == [0] * 6


def test_a_lock_that_is_taken_away(url, impatient):
    store = open_store(url)
    with store.lock() as check:
        store.write(LOCK, b'{"host": "other", "pid": 1, "token": "another", "time": 0}')
        deadline = time.monotonic() + 10
        with pytest.raises(UserError, match=r"the lock .*/.lock was lost to another precompute"):
            while time.monotonic() < deadline:
                check()
                time.sleep(0.01)
    assert b"another" in store.read(LOCK)  # it is not ours to delete


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"time": "then"}', b"\xff"])
def test_an_unreadable_lock_is_nobodys(url, impatient, content):
    store = open_store(url)
    store.write(LOCK, content)
    with store.lock():
        pass
    assert not store.exists(LOCK)
