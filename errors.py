"""What a user did wrong, told apart from a bug: the one exception that ends a command with a sentence, not a
traceback."""


class UserError(ValueError):
    """One clear sentence about a mistake of the user's, or about something the machine refused (a full disk,
    a lost file).

    Commands print it as `error: …` and exit with status 2, or 1 once work has begun. Every other exception is
    a bug and ends with its traceback."""


class SharedError(UserError):
    """A UserError that every process of a run raises, whichever of them met it: process 0 alone need print
    it."""
