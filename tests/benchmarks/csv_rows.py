"""The CSV of a benchmark, to which every measurement adds rows."""

import csv
from pathlib import Path


def append_rows(path: Path, rows: list[dict]):
    """Add rows to a CSV file, which is made if it is missing; numbers with a fraction keep four digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()})
