"""The one exception that is the user's to mend, and what it says of others."""

import textwrap


class UserError(Exception):
    """A mistake in input, settings or files: one line that names the file or setting and the cure (exit code 2)."""


def reason(error: Exception) -> str:
    """What a library's error says, on one line of at most 200 characters, cut between words."""
    return textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__
