"""cache info, verify, repair, gc: as a user meets them. What they find is tested in tests/cache."""

import shutil

import pytest
import torch
from typer.testing import CliRunner

from cli import app
from configs.errors import UserError
from tests.conftest import World, tree

NAME = "caches/damaged"


def run(verb: str, name: str = NAME) -> str:
    done = CliRunner().invoke(app, ["cache", verb, name])
    assert done.exit_code == 0, done.exception
    return done.output


def refusal(verb: str, name: str = NAME) -> str:
    done = CliRunner().invoke(app, ["cache", verb, name])
    assert isinstance(done.exception, UserError), done.output
    return str(done.exception)


def test_a_damaged_cache_is_repaired_to_the_same_bytes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.folder)
    torch.set_num_threads(1)
    cache = world.folder / NAME
    shutil.copytree(world.folder / "caches" / "tiny", cache)
    whole = tree(cache)
    assert "every byte is as it was written" in run("verify")
    assert "10 images with 1 views: 3 of 3 shards done" in run("info")

    shard = cache / "arrays" / "dense_tokens" / "c.1.0.0.0.0"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    (cache / "manifest.json").unlink()
    (cache / "shards" / "00002.json").write_bytes(whole["shards/00002.json"] + b" ")
    (cache / "arrays" / "views" / "c.0.0.0.tmp").write_bytes(b"half")
    assert "3 files are damaged" in refusal("verify")
    assert "manifest" in refusal("info")
    assert "no cache" in refusal("verify", "caches/nowhere")

    assert f"changed: {NAME}/arrays/dense_tokens/c.1.0.0.0.0" in run("repair")
    assert "1 files, 4 bytes freed" in run("gc")
    assert tree(cache) == whole
