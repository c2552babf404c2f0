"""Files: written whole or not at all, and the commit of the code that wrote them."""

import csv
import io
import os
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from models.errors import InputError, OutputError

ROOT = Path(__file__).resolve().parent.parent  # of the repository


@contextmanager
def whole_file(path: str | Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write and read that gets the name `path` once it is whole, and has a temporary name beside it until
    then: whatever kills the process leaves the old file or the new one. With `durable` so does a power failure, at the
    cost of waiting for the disk, seconds if it is busy. Raises OutputError if the file cannot be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as file:
            yield file
            if durable:  # before the renaming, or the name could be left without its content
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            _write_names(path.parent)
    except (OSError, RuntimeError) as error:
        # torch raises a RuntimeError of its own while it handles the OSError of a full disk.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OutputError(f"{path}: cannot be written ({cause.strerror}). Files written before are whole.") from None
    finally:
        with suppress(OSError):  # a disk may have become read-only
            temporary.unlink()


def _write_names(folder: Path):
    """Wait until the names of the files in a folder are on the disk as well."""
    if os.name == "nt":  # cannot open a folder
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def remove_temporaries(folder: Path, pattern: str = "*"):
    """Remove what killed processes were writing there with `whole_file`; nobody may be writing now."""
    for temporary in folder.glob(f".{pattern}.tmp"):
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | Path, data: bytes | memoryview | str | Iterable[str], durable: bool = True):
    """Write a `whole_file`. The parts of an iterable are written as they come, so that they need not all be in
    memory."""
    with whole_file(path, durable) as file:
        for part in [data] if isinstance(data, bytes | memoryview | str) else data:
            file.write(part.encode(errors="backslashreplace") if isinstance(part, str) else part)


def make_writable(folder: Path):
    """Make a folder and make sure that files can be written there, before the work starts. InputError if they
    cannot."""
    trial = folder / f".{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b"0")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to ({error.strerror}). Choose another folder.") from None
    finally:
        with suppress(OSError):
            trial.unlink()


def write_csv(path: Path, rows: list[dict]):
    """Write rows, at least one, under the keys of the first; numbers with a fraction get six digits."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_atomically(path, table.getvalue())


def portable(path: Path) -> str:
    """A path below the repository relative to it, so that a record can move with it; any other path in full."""
    path = path.resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def git_commit() -> str | None:
    """The commit of the code that runs, with "-dirty" when tracked files were changed; None outside a repository."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
