#!/usr/bin/env python3
"""What an evaluation costs besides the networks, and whether its memory grows with the number of cases.

  python tests/benchmarks/evaluation_cohort.py RUN RAW --csv tests/benchmarks/results/evaluation_cohort.csv

Each row is `evaluate.py RUN --cases FOLDER --save-nifti ...` on so many cases, which are links to those in RAW: every
case is read, prepared, predicted, taken back, scored by all standards, drawn and written. The seconds outside the
network are those of the whole run less the forward passes, start-up and all, by the number of cases. Memory is the peak
of the main process, and that of all its processes together (pages that they share count in each).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from itertools import cycle, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from csv_rows import append_rows

from models.cases import find_cases
from models.device import instruction_set
from models.files import ROOT, git_commit


def link_cases(raw: Path, folder: Path, count: int):
    for number, case in enumerate(islice(cycle(find_cases(raw)), count)):
        (folder / f"C{number:05}").mkdir(parents=True)
        for path in case.source_files:
            os.symlink(path.resolve(), folder / f"C{number:05}" / path.name.replace(case.name, f"C{number:05}"))


def rss_mib(pid: int) -> float:
    """Of a process and, by its own account, its children; 0 for one that has ended."""
    try:
        own = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return own + sum(rss_mib(int(child)) for child in children)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("raw", type=Path)
    parser.add_argument("--cases", type=int, nargs="+", default=[12, 126])
    parser.add_argument("--csv", type=Path, required=True)
    args = parser.parse_args()
    for count in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            raw, out = Path(folder, "raw"), Path(folder, "out")
            link_cases(args.raw, raw, count)
            command = [sys.executable, ROOT / "evaluate.py", args.run, "--cases", raw, "--allow-trained-on",
                       "--save-nifti", Path(folder, "maps"), "--out", out]  # fmt: skip
            start, all_mib, main_mib = time.perf_counter(), 0.0, 0.0
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
                while process.poll() is None:
                    all_mib = max(all_mib, rss_mib(process.pid))
                    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                    main_mib = max([main_mib, *(int(s.split()[1]) / 1024 for s in lines if s.startswith("VmHWM"))])
                    time.sleep(0.05)
            seconds = time.perf_counter() - start
            (run,) = json.loads((out / "summary.json").read_text())["runs"].values()
            assert run["cases"] == count, f"{run['cases']} of {count} cases"
        forward_s = run["forward_seconds_per_case"]
        row = {"cases": count, "seconds": seconds, "forward_s_per_case": forward_s,
               "outside_s_per_case": seconds / count - forward_s, "main_process_peak_mib": main_mib,
               "all_processes_peak_mib": all_mib}  # fmt: skip
        row = {key: f"{value:.4g}" for key, value in row.items()}
        row |= {"instruction_set": instruction_set(), "commit": git_commit(), "date": date.today().isoformat()}
        print(row)
        append_rows(args.csv, [row])


if __name__ == "__main__":
    main()
