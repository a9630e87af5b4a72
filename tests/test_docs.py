"""What README and docs/ say is so: commands and snippets run or at least parse; settings, files and links exist.

tests/markdown.py says which blocks are executed, and how a page tells.
"""

import ast
import re
import shlex
import tomllib
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.main import get_command

import pipeline.data.scenes
from cli import app
from configs.ablation import read_ablation
from configs.dataset import Dataset, Split
from configs.errors import UserError
from configs.load import as_settings, dataset_settings, known_datasets, resolve
from configs.schema import Config
from tests.conftest import ROOT, World
from tests.markdown import LANGUAGES, PAGES, Block, anchors, blocks, commands, inline_code, links, own_arguments
from tests.stages.studies.test_experiments import write_official

BLOCKS = [block for page in PAGES for block in blocks(page)]
SCENES = {"train": 12, "holdout": 6, "val": 6}  # images; to render all 2,400 takes half a minute
OTHER_PROGRAMS = ("make", "pip", "dask", "source")
OTHER_OPTIONS = ("--nthreads", "--nproc-per-node")  # of dask and torchrun
SETTING = rf"(?:{'|'.join(Config.model_fields)})\.[a-z0-9_.]+"
FILE = r"(?:benchmarks|cache|configs|docs|pipeline|stages|tests)/[\w./-]*"
FILE_NAME = r".*\.(?:json|md|npy|py|safetensors|txt|yaml)"  # train.txt is no setting


def of(language: str) -> list[Any]:
    return [pytest.param(block, id=block.where) for block in BLOCKS if block.language == language]


def each_page(pages: Sequence[Path]) -> list[Any]:
    return [pytest.param(page, id=page.name) for page in pages]


def leaves(command: Any) -> list[Any]:
    below = getattr(command, "commands", {}).values()
    return [leaf for each in below for leaf in leaves(each)] or [command]


def parsed(arguments: Sequence[str]) -> dict[str, Any]:
    """The options that a verb would be called with, and what the front door raises where it refuses them."""
    command: Any = get_command(app)  # made anew each time: its callbacks may be replaced
    command.callback = None
    for leaf in leaves(command):
        leaf.callback = lambda **options: options
    return command.main(list(arguments), prog_name="clip-zss", standalone_mode=False)


def check_settings(assignments: Sequence[str], dataset: str | None = None, config: Path | None = None) -> None:
    """UserError unless they resolve: for the dataset or experiment that is named, else for any dataset."""
    if config or dataset:
        resolve(dataset, config, assignments)
        return
    errors = []
    for name in known_datasets():
        try:
            resolve(name, assignments=assignments)
            return
        except UserError as error:
            errors.append(error)
    raise errors[0]


def check_setting(key: str) -> None:
    """UserError unless there is one of this name."""
    try:
        resolve(assignments=[f"{key}=?"])
    except UserError as error:
        if "unknown setting" in str(error):
            raise


def is_placeholder(value: object) -> bool:
    """NAME, say, in `datasets show NAME`."""
    return isinstance(value, str) and value.isupper()


def check_command(words: list[str]) -> None:
    """Another program's is only checked for what it takes of this project."""
    arguments = own_arguments(words)
    if arguments is not None:
        options = {key: value for key, value in parsed(arguments).items() if not is_placeholder(value)}
        dataset = options.get("dataset") or options.get("name")  # an option, or the argument of `datasets`
        if str(dataset).endswith(".yaml"):
            dataset = None  # the reader's own
        with chdir(ROOT):
            check_settings(options.get("set_", []), dataset, options.get("config"))
            if "table" in options:
                read_ablation(options["table"])
        return
    if words[:2] == ["python", "-m"]:
        assert words[2] == "venv" or (ROOT / f"{words[2].replace('.', '/')}.py").is_file(), words
    else:
        assert words[0] in OTHER_PROGRAMS or (words[0] == "python" and (ROOT / words[1]).is_file()), words
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), words
    for extra in re.findall(r"clip-zss\[(\w+)\]", " ".join(words)):
        assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"], words


def check_inline(code: str) -> None:
    """A command, an option, a setting with or without a value, or a path; whatever else it is, passes."""
    try:
        words = shlex.split(code)
    except ValueError:  # an apostrophe
        return
    command: Any = get_command(app)
    if len(words) > 1 and (words[0] in ("python", "clip-zss", "torchrun", *OTHER_PROGRAMS, *command.commands)):
        words = ["demo" if word == "VERB" else word for word in words]
        if words == ["clip-zss", "--install-completion"]:  # it acts at once
            return
        try:
            check_command(["clip-zss", *words] if words[0] in command.commands else words)
        except Exception as error:
            if type(error).__name__ not in ("MissingParameter", "BadOptionUsage"):  # `cache info`, `train --run`
                raise
    elif words and words[0] == "--set" and len(words) > 1:
        check_inline(words[1])
    elif words and words[0].startswith("--"):
        own = {option for leaf in [command, *leaves(command)] for each in leaf.params for option in each.opts}
        assert words[0] in own or words[0] in OTHER_OPTIONS, code
    elif re.fullmatch(SETTING + "=.+", code):
        check_settings([code])
    elif re.fullmatch(SETTING + "=?", code) and not re.fullmatch(FILE_NAME, code):
        check_setting(code.removesuffix("="))
    elif re.fullmatch(FILE, code):
        assert (ROOT / code).exists(), code


def run_snippet(block: Block, folder: Path) -> None:
    """Its names are its own; a traceback shows the page's lines."""
    code = compile("\n" * block.line + block.text, str(block.page), "exec")
    with chdir(folder):
        exec(code, {"__name__": "snippet"})


def run_block(block: Block, world: World) -> None:
    if block.language == "sh":
        for words in commands(block.text):
            arguments = own_arguments(words)
            assert arguments is not None, f"{block.where}: {words[0]} is executed by no test: say why it is parsed only"
            done = world.run(*arguments, check=False)
            assert done.returncode == 0, f"{block.where}: {shlex.join(words)}\n{done.stderr}"
    elif block.language == "python":
        run_snippet(block, world.folder)
    elif block.language == "yaml":
        assert block.file, f"{block.where}: say which file it is"
        path = world.folder / block.file
        path.write_text(block.text)
        if "classes" in yaml.safe_load(block.text):
            dataset_settings(str(path))
        else:
            resolve(config=path)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images of each split, where rendering finds the dataset there and leaves it."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    with mock.patch.dict(pipeline.data.scenes.SPLITS, SCENES):
        pipeline.data.scenes.write_scenes(folder)
    return folder


@pytest.mark.parametrize("page", each_page([page for page in PAGES if any(b.is_executed for b in blocks(page))]))
def test_a_page_runs_from_top_to_bottom(page: Path, scenes: Path, tmp_path: Path) -> None:
    """In a folder of its own: a page needs no other one to be read before."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "scenes").symlink_to(scenes)
    for block in blocks(page):
        if block.is_executed:
            run_block(block, World(tmp_path))


@pytest.mark.slow
def test_the_readme_runs(scenes: Path, tmp_path: Path) -> None:
    """Its commands in order, then its snippets; both stages with --runlocal, as at full size they take hours."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "scenes").symlink_to(scenes)
    write_official(tmp_path / "~" / "data", "pascal-voc")  # no shell expands the ~
    (tmp_path / "holiday").mkdir()
    for place in ("photo.jpg", "holiday/a.jpg"):
        Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / place)
    readme = PAGES[0]
    shown = [words for block in blocks(readme) if block.language == "sh" for words in commands(block.text)]
    shown += [shlex.split(code) for code in inline_code(readme) if code.startswith("python cli.py ")]
    ran = []
    for words in shown:
        arguments = own_arguments(words)
        if arguments is None:
            assert words[0] in ("python", "source", "pip"), words  # make the environment
            continue
        extra = {
            "precompute": ["--runlocal"], "train": ["--runlocal"], "export": ["--run", "runs/scenes-001"],
            "inspect-pseudolabels": ["--data-root", "~/data"],  # of the last cache, which is pascal-voc's
        }  # fmt: skip
        done = World(tmp_path).run(*arguments, *extra.get(arguments[0], []), check=False)
        assert done.returncode == (2 if arguments[0] == "datasets" else 0), (words, done.stderr)  # VOC has more images
        ran.append(arguments[0])
    assert {"precompute", "train", "evaluate", "predict", "datasets", "export", "inspect-pseudolabels"} <= set(ran)
    for block in blocks(readme):
        if block.language == "python":
            run_snippet(block, tmp_path)


@pytest.mark.parametrize("block", [block for block in of("sh") if not block.values[0].is_executed])
def test_commands_parse(block: Block) -> None:
    assert commands(block.text)
    for words in commands(block.text):
        check_command(words)


@pytest.mark.parametrize("block", of("python"))
def test_snippets_compile(block: Block) -> None:
    compile(block.text, block.where, "exec")


@pytest.mark.parametrize("page", each_page(PAGES))
def test_no_block_slips_through(page: Path) -> None:
    """By another language, or a fence that is indented or never closed."""
    assert {block.language for block in blocks(page)} <= LANGUAGES
    assert page.read_text().count("```") == 2 * len(blocks(page))


@pytest.mark.parametrize("page", each_page(PAGES))
def test_code_within_the_text(page: Path) -> None:
    for code in inline_code(page):
        check_inline(code)


@pytest.mark.parametrize("page", each_page([*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]))
def test_links_point_to_files_and_headings(page: Path) -> None:
    for link in links(page):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists() and (not anchor or anchor in anchors(target)), link


def test_concepts_show_the_defaults() -> None:
    """Of settings that are numbers: `loss.bank` (24)."""
    shown = re.findall(r"`(\w+)\.(\w+)` \(([\d.]+)[):]", (ROOT / "docs" / "concepts.md").read_text())
    assert len(shown) >= 10
    for section, name, value in shown:
        default = as_settings(Config.model_fields[section].default)[name]
        assert default == float(value), (section, name, default)


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("train --sed 1", "No such option: --sed"),
        ("trian --seed 1", "No such command 'trian'"),
        ("train --seed one", "valid int"),
        ("cache info", "Missing parameter: location"),
        ("train --set loss.bnk=2", "did you mean 'loss.bank'"),
        ("train --set loss.bank=-2", "greater than or equal to 0"),
        ("train --config configs/experiments/voc.yaml", "cannot read"),
        ("precompute --dataset pascal-vox", "did you mean 'pascal-voc'"),
        ("ablate lossess", "lossess"),
    ],
)
def test_a_mistake_in_a_command_is_found(mistake: str, said: str) -> None:
    with pytest.raises(Exception, match=said):
        check_command(["clip-zss", *mistake.split()])


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("python cli.py trian x", "No such command"),
        ("cache inform", "No such command"),
        ("--sed", "--sed"),
        ("--set loss.bank=x", "valid integer"),
        ("loss.bank=x", "valid integer"),
        ("loss.bnk", "did you mean 'loss.bank'"),
        ("docs/none.md", "docs/none.md"),
    ],
)
def test_a_mistake_within_the_text_is_found(mistake: str, said: str) -> None:
    with pytest.raises(Exception, match=said):
        check_inline(mistake)


@pytest.mark.parametrize(
    ("language", "text"),
    [("python", "assert 1 == 2"), ("sh", "clip-zss cache info nowhere"), ("sh", "ls"), ("yaml", "name: unmarked")],
)
def test_a_block_that_fails_is_found(language: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        run_block(Block(PAGES[-1], 1, language, "", text), World(tmp_path))


def test_the_yaml_in_full_has_every_key() -> None:
    block = next(block for block in blocks(ROOT / "docs" / "datasets.md") if block.language == "yaml")
    content = yaml.safe_load(block.text)
    assert list(content) == list(Dataset.model_fields)
    assert {key for split in content["splits"].values() for key in split} == set(Split.model_fields)


def test_contributing_lists_the_slow_tests() -> None:
    marked = [
        node.name
        for file in (ROOT / "tests").rglob("test_*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and "pytest.mark.slow" in map(ast.unparse, node.decorator_list)
    ]
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert sorted(name for _, name in rows) == sorted(marked)
    timed = [int(seconds) for seconds, _ in rows]
    assert timed == sorted(timed, reverse=True)
