"""Errors and warnings about what the person at the terminal can fix."""


class InputError(ValueError):
    """One line that names the file or flag and the remedy; a script prints it and ends with exit status 2."""


class Interrupted(KeyboardInterrupt):
    """A signal ended a script: Interrupted(number, text), where the text says what is kept and how to go on; "" is not
    printed."""


class OutputError(InputError):
    """A file cannot be written, as on a full disk: the next case would fail as well."""


class InputWarning(UserWarning):
    """Something doubtful about an input that is used nevertheless: InputWarning(what, text). The scripts show it in one
    line; preprocessing keeps it in warnings.csv."""

    def __str__(self):
        return ": ".join(map(str, self.args))


def one_line(error, limit: int = 300) -> str:
    """The text of an exception, or of another value, in one line of at most `limit` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
