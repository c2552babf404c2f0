#!/usr/bin/env python3
"""What `make demo` takes and what its networks learn: minutes, and the Dice of the regions on the phantom test cases.

  python tests/benchmarks/demo_speed.py --csv tests/benchmarks/results/demo.csv

Runs it in a clean clone of HEAD, set-up first and apart. A row is appended to the CSV.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from csv_rows import append_rows

from models.device import choose_device, device_name

ROOT = Path(__file__).parents[2]
REGIONS = ("WT", "TC", "ET")


def minutes_of(command: list[str], folder: Path) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True)
    return (time.perf_counter() - start) / 60


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True)
    args = parser.parse_args()
    commit = subprocess.check_output(["git", "-C", str(ROOT), "rev-parse", "HEAD"], text=True).strip()
    row = {"date": time.strftime("%Y-%m-%d"), "commit": commit, "device": device_name(choose_device("auto")),
           "torch": torch.__version__}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "clone")
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        row["setup_minutes"] = minutes_of(["make", ".venv/ready"], clone)
        row["minutes"] = minutes_of(["make", "demo"], clone)
        with (clone / "demo/comparison/comparison.csv").open(newline="") as file:
            for run in csv.DictReader(file):
                if run["model"] in ("unet", "swinunetr"):
                    dice = {region: float(run[f"dice_{region}"]) for region in REGIONS}
                    row |= {f"{run['model']}_{region}": value for region, value in dice.items()}
                    row[f"{run['model']}_mean"] = sum(dice.values()) / len(dice)
    print(row)
    append_rows(args.csv, [row])


if __name__ == "__main__":
    main()
