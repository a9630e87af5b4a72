"""A small Hugging Face hub on this machine: what its client asks for to read a repository."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

SHA = "0" * 40  # of the only commit


def put(cache: Path, repository: str, files: dict[str, bytes]) -> None:
    """A repository as huggingface_hub keeps it."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(SHA)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)


@contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Yields the address (HF_ENDPOINT) and the list of files that are asked for.

    Args:
        repositories: folder by name: `models/ORG/NAME` or `datasets/ORG/NAME`.
    """
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            api, parts = path.startswith("/api/"), unquote(path).removeprefix("/api").strip("/").split("/")
            if not api and parts[0] != "datasets":
                parts.insert(0, "models")
            root = repositories.get("/".join(parts[:3]))
            if root is None:
                self.answer(b"", 404)
            elif not api:
                self.file(root, "/".join(parts[5:]))  # after resolve and the revision
            elif parts[3:4] == ["tree"]:
                self.listing(root, root / "/".join(parts[5:]), "recursive=true" in query.lower())
            else:
                files = [{"rfilename": str(file.relative_to(root))} for file in root.rglob("*") if file.is_file()]
                self.answer(json.dumps({"id": "/".join(parts[1:3]), "sha": SHA, "siblings": files}).encode())

        def listing(self, root: Path, folder: Path, deep: bool) -> None:
            entries: list[dict[str, Any]] = []
            for path in sorted(folder.rglob("*") if deep else folder.glob("*")):
                entry = {"path": path.relative_to(root).as_posix(), "oid": SHA}
                size = {"type": "file", "size": path.stat().st_size} if path.is_file() else {"type": "directory"}
                entries.append(entry | size)
            self.answer(json.dumps(entries).encode(), 200 if folder.is_dir() else 404)

        def file(self, root: Path, name: str) -> None:
            if not (root / name).is_file():
                self.answer(b"", 404)
                return
            asked.append(name)
            content = (root / name).read_bytes()
            tag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": SHA}
            first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
            if first:
                part = content[int(first) : int(last) + 1 if last else None]
                span = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
                self.answer(part, 206, {"Content-Range": span, **tag})
            else:
                self.answer(content, 200, tag)

        def answer(self, content: bytes, code: int = 200, headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            missing = {"X-Error-Code": "EntryNotFound"} if code == 404 else {}
            for name, value in {**missing, **(headers or {}), "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
