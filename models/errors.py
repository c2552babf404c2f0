"""What goes wrong by something that the person at the terminal can mend."""


class InputError(ValueError):
    """One line that names the file or flag and the remedy; a script ends with it and exit status 2, no traceback."""


class Interrupted(KeyboardInterrupt):
    """A signal ended a script: Interrupted(its number, what is kept and how to go on, "" to say nothing)."""


class OutputError(InputError):
    """A file cannot be written, as on a full disk: there is no use in going on with the next case."""


class InputWarning(UserWarning):
    """What is doubtful about an input that is used all the same: InputWarning(what, text). The scripts show it in one
    line; preprocessing keeps it in warnings.csv."""

    def __str__(self):
        return ": ".join(map(str, self.args))


def one_line(error, limit: int = 300) -> str:
    """The text of an exception, or of another value, in one line of at most `limit` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
