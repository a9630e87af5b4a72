"""Full and read-only disks, object stores that fail for a while: a clear line or recovery, then the same bytes."""

import http.client
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

import cache.url
from tests.conftest import World, tree


def mount(*arguments: str | Path) -> bool:
    return bool(shutil.which("mount")) and subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


@contextmanager
def disk_of(size: str, folder: Path, *options: str) -> Iterator[Path]:
    """A file system of so many bytes; `options` of umount."""
    folder.mkdir()
    if not mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder):
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", *options, folder], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The world's cache takes about 180 kB, of which shards 22 at most."""
    with disk_of("20k", tmp_path / "disk") as disk:
        yield disk


def test_a_disk_that_gets_full(world: World, small_disk: Path) -> None:
    command = ("precompute", "--config", world.config, "--cache", small_disk / "cache")
    assert "are needed: free some space" in world.fails(*command)
    assert not (small_disk / "cache").exists()
    assert mount("-o", "remount,size=140k", small_disk)  # enough to begin
    line = world.fails(*command)
    assert f"cannot write {small_disk / 'cache'}/" in line  # arrays or a record, by whose turn it was
    assert "No space left on device" in line and "free some space, then run the same command again" in line
    assert mount("-o", "remount,size=10m", small_disk)
    world.run(*command)
    assert tree(small_disk / "cache") == tree(world.folder / "caches" / "tiny")


def test_a_read_only_disk(world: World, small_disk: Path) -> None:
    assert mount("-o", "remount,ro", small_disk)
    line = world.fails("precompute", "--config", world.config, "--cache", small_disk / "cache")
    assert str(small_disk) in line and "Read-only file system" in line and "choose another --cache" in line
    # A cache that is complete needs no writing.
    assert mount("-o", "remount,rw,size=10m", small_disk)
    shutil.copytree(world.folder / "caches" / "tiny", small_disk / "cache")
    assert mount("-o", "remount,ro", small_disk)
    again = world.run("precompute", "--config", world.config, "--cache", small_disk / "cache")
    assert "nothing to do" in again.stderr


class Flaky(ThreadingHTTPServer):
    """Hands requests on to a server, or answers 500: a share of them, and all of them for `outage` seconds, once."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), FlakyHandler)
        self.backend, self.share, self.outage, self.after = port, 0.0, 0.0, 0
        self.began, self.requests, self.refused = 0.0, 0, 0
        self.draw = random.Random(0)

    def refuses(self) -> bool:
        self.requests += 1
        if self.outage and self.requests > self.after:
            self.began = self.began or time.monotonic()
            if time.monotonic() < self.began + self.outage:
                return True
        return self.draw.random() < self.share


class FlakyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Flaky

    def handle_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.refuses():
            self.server.refused += 1
            self.answer(500, {}, b"")
            return
        backend = http.client.HTTPConnection("127.0.0.1", self.server.backend, timeout=30)
        backend.request(self.command, self.path, body, dict(self.headers))
        reply = backend.getresponse()
        self.answer(reply.status, dict(reply.getheaders()), reply.read())
        backend.close()

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_one

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""


@contextmanager
def moto() -> Iterator[int]:
    """An S3 server in a process of its own; its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("PUT", "/bucket")
                connection.getresponse()
                break
            except OSError:
                time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def s3() -> Iterator[Flaky]:
    pytest.importorskip("moto", reason="no S3 server: pip install moto[server] s3fs")
    pytest.importorskip("s3fs")
    with moto() as port:
        server = Flaky(port)
        Thread(target=server.serve_forever, daemon=True).start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                patch.setenv(name, "test")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            yield server
        server.shutdown()


def download(url: str, folder: Path) -> dict[str, bytes]:
    import fsspec

    files, root = fsspec.url_to_fs(url, use_listings_cache=False)
    files.get(root, str(folder), recursive=True)
    return tree(folder)


@pytest.mark.parametrize(("share", "outage"), [(0.0, 0.0), (0.2, 0.0), (0.0, 5.0)])
def test_an_object_store_that_answers_500_for_a_while(
    world: World, s3: Flaky, tmp_path: Path, share: float, outage: float
) -> None:
    url = f"s3://bucket/cache-{share}-{outage}"
    s3.share, s3.outage, s3.after = share, outage, s3.requests + 60  # which is amid the shards
    s3.began, s3.refused = 0.0, 0
    try:
        world.run("precompute", "--config", world.config, "--cache", url)
    finally:
        s3.share = s3.outage = 0.0
    assert (s3.refused > 0) == bool(share or outage)
    assert download(url, tmp_path / "copy") == tree(world.folder / "caches" / "tiny")
    assert "every byte is as it was written" in world.run("cache", "verify", url).stdout


def test_an_object_store_that_stays_away(world: World, s3: Flaky, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setattr(cache.url, "RETRY_DELAYS", (0.01, 0.01))
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    s3.share = 1.0
    try:
        line = world.fails("precompute", "--config", world.config, "--cache", "s3://bucket/away")
    finally:
        s3.share = 0.0
    assert "s3://bucket/away" in line and "then run the same command again" in line
