"""The tables in README.md say what the committed CSV files say."""

import csv

from conftest import ROOT

RESULTS = ROOT / "tests/benchmarks/results"


def table_under(first_header: str) -> list[list[str]]:
    """The cells of the README's table whose header row begins so, without header and rule."""
    lines = iter((ROOT / "README.md").read_text(encoding="utf-8").splitlines())
    assert any(line.startswith(f"| {first_header} |") for line in lines), first_header
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_the_memory_table():
    rows = list(csv.DictReader((RESULTS / "swinunetr_memory.csv").open()))
    counted = [key for key in rows[0] if key.endswith("(counted GiB)")]
    expected = [
        [row["size"], row["feature_size"], row["precision"], *(f"{float(row[key]):.2f}" for key in counted)]
        for row in rows
    ]
    assert table_under("size | feature size | precision") == expected
