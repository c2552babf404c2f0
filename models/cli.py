"""What the command lines of the scripts share: argument types and exit statuses. Imports nothing heavy, so that
`--help` and a usage error answer at once."""

import argparse
import os
import sys


def run(main):
    """Call `main()` and turn what it returns or raises into an exit status: 0 done, 1 done but some cases failed,
    2 unusable command or input (one line, no traceback unless --debug), 130 interrupted."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` closed the pipe: nothing to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except ValueError as error:
        if "--debug" in sys.argv or type(error).__name__ != "InputError":
            raise
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)


def parser(docstring: str) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring followed by the flags with their defaults."""
    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        """Both at once: the docstring as it stands, and the defaults."""

    result = argparse.ArgumentParser(description=docstring, formatter_class=Formatter)
    result.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return result


def positive_int(text: str) -> int:
    return _number(text, int, lambda value: value > 0, "a whole number above 0")


def natural(text: str) -> int:
    return _number(text, int, lambda value: value >= 0, "a whole number, 0 or more")


def positive_float(text: str) -> float:
    return _number(text, float, lambda value: 0 < value < float("inf"), "a number above 0")


def fraction(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def _number(text, kind, fits, wanted):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value
