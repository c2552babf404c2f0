#!/usr/bin/env python3
"""How much faster several workers preprocess than one: cases per second of preprocess_brats.py, in turns.

  python -m models.phantom PHANTOMS --cases 64
  python tests/benchmarks/preprocessing_workers.py PHANTOMS --csv tests/benchmarks/results/preprocessing_workers.csv

The start of the script and of its workers does not count: it is the same for 64 cases and for 1,251. A run on a few
cases is therefore taken off a run on all, and both belong to one turn.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

from csv_rows import append_rows
from preprocessing_speed import processor

from models.cli import usable_cpus
from models.files import git_commit

SCRIPT = Path(__file__).parents[2] / "preprocess_brats.py"
FEW = 8  # cases of the run that is taken off


def seconds(raw: Path, workers: int, cases: int) -> float:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, SCRIPT, raw, f"{out}/tensors", "--workers", str(workers),
                   "--limit", str(cases), "--compact"]  # fmt: skip
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path)
    parser.add_argument("--cases", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, usable_cpus()], help="compared with the first")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    per_second = {workers: [] for workers in args.workers}
    for _ in range(args.turns):
        for workers, rates in per_second.items():
            few, all_of_them = (seconds(args.raw, workers, cases) for cases in (FEW, args.cases))
            rates.append((args.cases - FEW) / (all_of_them - few))
    base = args.workers[0]
    rows = []
    for workers, rates in per_second.items():
        ratio = median(rate / alone for rate, alone in zip(rates, per_second[base], strict=True))
        rows.append({"workers": workers, "cases_per_s": f"{median(rates):.2f}", "times_one": f"{ratio:.3f}",
                     "share_of_ideal": f"{ratio * base / workers:.3f}", "turns": args.turns, "processor": processor(),
                     "commit": git_commit(), "date": date.today()})  # fmt: skip
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    if args.csv:
        append_rows(args.csv, rows)


if __name__ == "__main__":
    main()
