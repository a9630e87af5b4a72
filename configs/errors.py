"""The exception for mistakes that the user can fix, and one-line reasons for other exceptions."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A mistake in input, settings or files: one line that names the file or setting and the remedy (exit code 2)."""


def reason(error: Exception) -> str:
    """A library's error message on one line, cut at a word to at most 200 characters."""
    return textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError while the block writes `path` becomes a UserError that names it; that of a full disk does not."""
    try:
        yield
    except OSError as error:
        cure = "free some space, or check its permissions and the disk"
        raise UserError(f"cannot write {path} ({error.strerror or reason(error)}): {cure}") from error
