#!/usr/bin/env python3
"""What `make demo` takes and what its networks learn: minutes, and the Dice of the regions on the phantom test cases.

  python tests/benchmarks/demo_speed.py --csv tests/benchmarks/results/demo.csv --seeds 0 1 2

Runs it in a clean clone of HEAD, set-up first and apart, once for each seed of the trainings. Each run appends a row to
the CSV.
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
NETWORKS, REGIONS = ("unet", "swinunetr"), ("WT", "TC", "ET")


def minutes_of(command: list[str], folder: Path) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True)
    return (time.perf_counter() - start) / 60


def demo(seed: int) -> dict:
    """Make it once: a row of the CSV."""
    commit = subprocess.check_output(["git", "-C", str(ROOT), "rev-parse", "HEAD"], text=True).strip()
    row = {"date": time.strftime("%Y-%m-%d"), "commit": commit, "device": device_name(choose_device("auto")),
           "torch": torch.__version__, "seed": seed}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "clone")
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        row["setup_minutes"] = minutes_of(["make", ".venv/ready"], clone)
        row["minutes"] = minutes_of(["make", "demo", f"SEED={seed}"], clone)
        with (clone / "demo/comparison/comparison.csv").open(newline="") as file:
            for run in csv.DictReader(file):
                if run["model"] in NETWORKS:
                    dice = {region: float(run[f"dice_{region}"]) for region in REGIONS}
                    row |= {f"{run['model']}_{region}": value for region, value in dice.items()}
                    row[f"{run['model']}_mean"] = sum(dice.values()) / len(dice)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    for seed in args.seeds:
        row = demo(seed)
        print(row)
        append_rows(args.csv, [row])


if __name__ == "__main__":
    main()
