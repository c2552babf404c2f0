#!/usr/bin/env python3
"""What many cases cost besides the work on them: memory of the main process, and seconds of a run with nothing to do.

  python tests/benchmarks/preprocessing_cohort.py --csv tests/benchmarks/results/preprocessing_cohort.csv

The cases are hard links to one of 24^3 voxels, preprocessed to 8^3. Memory is the peak of the main process alone
(Linux), its floor that of Python with the packages that the script imports.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import write_raw_case
from preprocessing_speed import processor

from models.files import git_commit, write_csv


def make_cohort(folder: Path, count: int):
    template, _, _ = write_raw_case(folder.parent, "T", shape=(24, 24, 24))
    for index in range(count):
        case = folder / f"C{index:05d}"
        case.mkdir(parents=True)
        for file in template.iterdir():
            os.link(file, case / file.name.replace("T_", f"{case.name}_"))


def run(raw: Path, out: Path, workers: int) -> tuple[float, float]:
    """(wall seconds, peak MiB of the main process) of preprocess_brats.py."""
    script = Path(__file__).parents[2] / "preprocess_brats.py"
    command = [sys.executable, script, raw, out, "--size", "8", "--workers", str(workers)]
    start, peak_mib = time.perf_counter(), 0.0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak_mib = max([peak_mib, *(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))])
            time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{script} ended with {process.returncode}")
    return time.perf_counter() - start, peak_mib


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, nargs="+", default=[10, 1251, 10000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--csv", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for count in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            raw, out = Path(folder, "raw"), Path(folder, "out")
            make_cohort(raw, count)
            (first_s, peak_mib), (again_s, _) = (run(raw, out, args.workers) for _ in range(2))
        rows.append({"cases": count, "main_process_peak_mib": f"{peak_mib:.0f}", "first_run_s": f"{first_s:.1f}",
                     "second_run_s": f"{again_s:.2f}", "processor": processor(), "commit": git_commit(),
                     "date": date.today().isoformat()})  # fmt: skip
        print(rows[-1])
    write_csv(args.csv, rows)


if __name__ == "__main__":
    main()
