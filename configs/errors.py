"""The exception for mistakes that the user can fix, and one-line reasons for other exceptions."""

import textwrap


class UserError(Exception):
    """A mistake in input, settings or files: one line that names the file or setting and the remedy (exit code 2)."""


def reason(error: Exception) -> str:
    """A library's error message on one line, cut at a word to at most 200 characters."""
    return textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__
