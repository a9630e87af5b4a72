"""Class features are kept for convenience: where they cannot be, they are computed all the same."""

import ast
import re
import shutil
from pathlib import Path

import pytest
from typer.main import get_command

import cli
from tests.conftest import ROOT, World

# Options that messages name and that are other programs'.
OTHERS = {"--shm-size", "--nthreads", "--nproc-per-node", "--gpus", "--help"}


@pytest.mark.parametrize("obstacle", ["a file", "a broken link"])
def test_predict_with_new_words_where_nothing_can_be_kept(
    world: World, trained: Path, tmp_path: Path, obstacle: str
) -> None:
    """A read-only folder, for root too."""
    shutil.copytree(world.data, tmp_path / "data")
    shutil.copytree(trained, tmp_path / "runs" / "one")
    for file in world.folder.glob("tiny*"):
        shutil.copy(file, tmp_path)
    if obstacle == "a file":
        (tmp_path / "caches").write_text("")
    else:
        (tmp_path / "caches").symlink_to("/proc/nowhere")
    here = World(tmp_path)
    run = trained.relative_to(world.folder)
    arguments = ("predict", "data/tiny/images/val-0.png", "--run", run, "--classes", "walrus, teapot", "--output")
    said = here.run(*arguments, "found").stderr
    assert said.count("warning: class features are not kept for the next run") == 1
    (tmp_path / "caches").unlink()
    assert "not kept" not in here.run(*arguments, "kept").stderr
    mask = "val-0.png.mask.png"
    assert (tmp_path / "found" / mask).read_bytes() == (tmp_path / "kept" / mask).read_bytes()


def test_cures_name_options_that_exist() -> None:
    """Every option in a message is one of some verb."""
    known = set(OTHERS)

    def collect(command: object) -> None:
        known.update(option for each in command.params for option in each.opts)  # type: ignore[attr-defined]
        for below in getattr(command, "commands", {}).values():
            collect(below)

    collect(get_command(cli.app))
    for folder in ("cache", "configs", "pipeline", "stages"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                    for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", node.value):
                        assert option in known, f"{file}: {option}"
    assert {"--lender", "--cache"} <= known
