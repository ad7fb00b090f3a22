"""How a command ends where it can't go on: what a user did wrong is one exception and a sentence, told apart
from a bug, which is a traceback; a Ctrl-C is a line."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """One clear sentence about a mistake of the user's, or about something the machine refused (a full disk,
    a lost file).

    Commands print it as `error: …` and exit with status 2, or 1 once work has begun. Every other exception is
    a bug and ends with its traceback."""


class SharedError(UserError):
    """A UserError that every process of a run raises, whichever of them met it: process 0 alone need print
    it."""


def exit_with(main: Callable[[list[str]], int | None], argv: list[str]) -> None:
    """Run a command's `main` and leave with its status; with one line and 130 after a Ctrl-C.

    For a command of one process: those of several leave by launch/distributed.py's `exit`."""
    try:
        sys.exit(main(argv))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
