"""Settings of a run, and the one error that a user is meant to read."""

from __future__ import annotations


class InputError(Exception):
    """What the user gave cannot be used.

    The message is one sentence that names the file, line or id, says what was expected and what to do. Commands
    print it without a stack trace and end with status 1.
    """
