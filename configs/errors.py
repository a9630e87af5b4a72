"""The one exception that is the user's to mend, and what it says of others."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A mistake in input, settings or files: one line that names the file or setting and the cure (exit code 2)."""


def reason(error: Exception) -> str:
    """What a library's error says, on one line of at most 200 characters, cut between words."""
    return textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system says while the block writes `path` becomes a UserError; of a full disk it names no file."""
    try:
        yield
    except OSError as error:
        cure = "free some space, or mend its permissions or the disk"
        raise UserError(f"cannot write {path} ({error.strerror or reason(error)}): {cure}") from error
