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


def whole_benchmark() -> list[dict]:
    """The rows of the run of benchmark_inference.py over every engine, the fastest first within a network."""
    (path,) = (ROOT / "benchmarks").glob("inference-*-cpu.csv")
    rows = [row for row in csv.DictReader(path.open()) if row["status"] == "ok" and "--profile" in row["command"]]
    return sorted(rows, key=lambda row: (row["network"], float(row["p50_ms"])))


def digits(value: str, places: int = 0) -> str:
    return f"{float(value):.{places}f}"


def test_the_engine_table():
    expected = [
        [*(row[key] for key in ("model", "engine", "dtype", "layout")),
         *(digits(row[f"{key}_ms"]) for key in ("p50", "p90", "floor")),
         digits(row["times_faster_than_monai_eager"], 1), digits(row["peak_gib"], 1), digits(row["first_use_s"]),
         f"{float(row['label_agreement']):.2%}"]
        for row in whole_benchmark()
    ]  # fmt: skip
    assert len(expected) >= 20 and table_under("network | engine | type | layout") == expected


def test_the_end_to_end_table():
    """The fastest engine of every network."""
    fastest, stages = {}, ("load", "preprocess", "forward", "postprocess", "write")
    for row in whole_benchmark():
        fastest.setdefault(row["model"], row)
    expected = []
    for model, row in fastest.items():
        spent = [float(row[f"{stage}_ms"]) for stage in stages]
        whole = sum(spent)
        durations = (*spent, whole, whole - float(row["forward_ms"]))
        expected.append([f"{model}: {row['engine']}, {row['dtype']}", *(f"{ms:.0f}" for ms in durations)])
    assert table_under("from files to a label map") == expected


def test_the_profile_table():
    (path,) = (ROOT / "benchmarks").glob("inference-*-cpu-profile.csv")
    expected = []
    for row in csv.DictReader(path.open()):
        spent = [float(value) for key, value in row.items() if key not in ("network", "row")]
        expected.append([row["row"], *(f"{ms:.0f}" for ms in spent), f"{sum(spent):.0f}"])
    assert table_under("ms of one pass") == expected
