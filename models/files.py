"""Files: written whole or not at all, and the commit of the code that wrote them."""

import csv
import io
import os
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from models.errors import InputError

ROOT = Path(__file__).resolve().parent.parent  # of the repository


def write_atomically(path: str | Path, data: bytes | memoryview | str | Iterable[str]):
    """Write to a temporary name beside `path` and rename: a file with its final name is whole. The parts of an iterable
    are written as they come, so that they need not all be in memory."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for part in [data] if isinstance(data, bytes | memoryview | str) else data:
                file.write(part.encode(errors="backslashreplace") if isinstance(part, str) else part)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_writable(folder: Path):
    """Make a folder, and see that files can be written there: before the work starts, not after it. InputError where
    they cannot."""
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
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_atomically(path, table.getvalue())


def portable(path: Path) -> str:
    """A path below the repository as it is called from there, so that a record can move with it; another in full."""
    path = path.resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def git_commit() -> str | None:
    """The commit of the code that runs, with "-dirty" when tracked files were changed; None outside a repository."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
