"""The tables in README.md say what the committed CSV files say."""

import csv
import statistics

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


def test_the_speed_table():
    """Medians of the runs, and of each group of MONAI's networks the fastest beside the fastest of ours."""
    seconds = {}
    for row in csv.DictReader((RESULTS / "swinunetr_speed_cpu.csv").open()):
        setting = f"{row['mode']}, {row['dtype']}, {row['size']}³, feature size {row['feature_size']}"
        seconds.setdefault(setting, {}).setdefault(row["network"], []).append(float(row["seconds"]))
    expected = []
    for setting, networks in seconds.items():
        medians = {name: statistics.median(values) for name, values in networks.items()}
        ours = min(median for name, median in medians.items() if name.startswith("ours"))
        default = medians["monai"]
        best = min(median for name, median in medians.items() if name.startswith("monai"))
        expected.append([setting, f"{ours:.2f} s", f"{default:.2f} s", f"{best:.2f} s", f"**{default / ours:.1f}**",
                         f"**{best / ours:.1f}**"])  # fmt: skip
    assert table_under("CPU, 2 threads") == expected
