"""The one exception that is the user's to mend."""


class UserError(Exception):
    """A mistake in input, settings or files: one line that names the file or setting and the cure (exit code 2)."""
