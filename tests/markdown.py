"""What the README and the pages of docs/ show: blocks of code, commands in them, code within the text, links.

How a block is checked stands before it:

    ```sh                                   executed, as is every ```python block
    <!-- parsed only: needs a cluster -->   ... but not this one: it is only parsed
    <!-- file: my-photos.yaml -->           a ```yaml block that is written to this file, for commands to read
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"sh", "python", "yaml", "toml", "text", ""}  # another one would slip through what is checked
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- (parsed only: .+|file: .+) -->\n$")


@dataclass(frozen=True)
class Block:
    """A fenced block. `line` is that of its fence, from 1."""

    page: Path
    line: int
    language: str
    mark: str  # of the comment right before it, or ""
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_executed(self) -> bool:
        """The README's blocks have a test of their own: its page has no place for marks."""
        return self.page.name != "README.md" and not self.mark.startswith("parsed only")

    @property
    def file(self) -> str | None:
        return self.mark.removeprefix("file: ") if self.mark.startswith("file: ") else None


def blocks(page: Path) -> list[Block]:
    text, found = page.read_text(), []
    for fence in _FENCE.finditer(text):
        before = text[: fence.start()]
        mark = _MARK.search(before)
        found.append(Block(page, before.count("\n") + 1, fence[1], mark[1] if mark else "", fence[2]))
    return found


def commands(shell: str) -> list[list[str]]:
    """The words of every command of a shell block, without comments, a final & and settings of the environment."""
    found = []
    for line in shell.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        if words:
            found.append(words[:-1] if words[-1] == "&" else words)
    return found


def own_arguments(words: list[str]) -> list[str] | None:
    """What follows `clip-zss` or `python cli.py` or `torchrun ... cli.py`; None for another program's command."""
    if words[0] == "clip-zss":
        return words[1:]
    if words[0] in ("python", "torchrun") and "cli.py" in words:
        return words[words.index("cli.py") + 1 :]
    return None


def inline_code(page: Path) -> list[str]:
    """Code within the text, on one line each."""
    text = _FENCE.sub("", page.read_text())
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def links(page: Path) -> list[str]:
    """Where links and pictures point that are no URLs, each perhaps with # and an anchor."""
    targets = re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", page.read_text()))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> list[str]:
    """The anchors that GitHub gives the page's headings."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
