#!/usr/bin/env python3
"""What --init is worth for somebody with few cases: the Dice after a short training from three kinds of weights.

  python preprocess_brats.py REAL DATA --size 64 --folds 4 --test-share 0
  python -m models.phantom PHANTOMS --cases 24
  python preprocess_brats.py PHANTOMS PHANTOM_DATA --size 64 --test-share 0
  python tests/benchmarks/initial_weights.py DATA PHANTOM_DATA --seeds 0 1 2
  python tests/benchmarks/initial_weights.py DATA --weights RUN/last.pt --amp off --seeds 0 1 2

Of each fold of DATA, its own cases are scored and those of the next fold are what somebody has: the U-Net is trained on
these alone for --epochs epochs, from random weights, from weights that were trained on the patients of the other folds,
and from weights that were trained on phantoms, which no scan went into. Or from --weights alone, which are called by
the names of their runs. The weights themselves are scored, too; those given with the first seed alone.
Interrupted, it goes on with the next training. Each scored case adds a row per target to the CSV.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from csv_rows import append_rows
from recipe import ROOT, dice_of_cases, difference, means, scores_of

from models.brats import LABELS, TARGETS
from models.device import AMP_DTYPES, choose_device, device_name
from models.files import git_commit
from models.tensors import load_case

RESULTS = Path(__file__).parent / "results" / "initial_weights.csv"
RUNS = ROOT / "models" / "unet" / "results"
WEIGHTS_EPOCHS = 40  # of the trainings that make the weights


def subset(data: Path, name: str, train: list[str], scored: list[str]) -> Path:
    """A data set of links to the cases of another, with this split. The scored cases are those that are validated on;
    what counts is the last epoch, on which they have no influence."""
    folder = data.parent / f"{data.name}-{name}"
    folder.mkdir(exist_ok=True)
    for path in data.glob("*.pt"):
        if not (folder / path.name).exists():
            os.symlink(path.resolve(), folder / path.name)
    (folder / "manifest.json").write_text((data / "manifest.json").read_text())
    split = {"train": train, "validation": scored, "test": []}
    (folder / "splits.json").write_text(json.dumps(split | {"folds": [split]}))
    return folder


def train(data: Path, name: str, epochs: int, seed: int, amp: str, *flags: str) -> Path:
    """Train, unless that is done; returns the last checkpoint."""
    last = RUNS / name / "last.pt"
    command = [sys.executable, "train_unet.py", data.resolve(), "--epochs", epochs, "--seed", seed, "--run-name", name,
               "--amp", amp, *flags, *["--resume"] * last.exists()]  # fmt: skip
    result = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stderr[-3000:]}")
    return last


def rows_of(checkpoint: Path, data: Path, scored: list[str], described: dict) -> list[dict]:
    device = choose_device("auto")
    dice, rows = dice_of_cases(checkpoint, data, scored, device), []
    for case in scored:
        label = load_case(data / f"{case}.pt")["label"]
        for target, values in TARGETS.items():
            voxels = int(torch.isin(label, torch.tensor(values)).sum())
            rows.append(described | {"case": case, "target": target, "true_voxels": voxels,
                                     "dice_last": dice[case][target], "device": device_name(device),
                                     "commit": git_commit(), "date": time.strftime("%Y-%m-%d")})  # fmt: skip
    return rows


def make_weights(data: Path, phantoms: Path, folds: list[list[str]], fold: int, seed: int, amp: str) -> dict:
    """name -> checkpoint, or None for random weights: the starts where the cases of this fold are scored."""
    kept_apart = (*folds[fold], *own_cases(folds, fold))
    seen = [case for other in folds for case in other if case not in kept_apart]
    there = subset(data, f"others{fold}", seen, folds[fold])
    return {
        "random": None,
        "phantoms": train(phantoms, f"init-phantoms-s{seed}", WEIGHTS_EPOCHS, seed, amp),
        "patients": train(there, f"init-patients{fold}-s{seed}", WEIGHTS_EPOCHS, seed, amp),
    }


def own_cases(folds: list[list[str]], fold: int) -> list[str]:
    """What somebody has to train on where the cases of this fold are scored."""
    return folds[(fold + 1) % len(folds)]


def measure(data: Path, weights: dict, folds: list[list[str]], fold: int, epochs: int, seed: int, amp: str, path: Path,
            as_they_are: bool):  # fmt: skip
    """Train from each of the weights and score that, and the weights themselves `as_they_are`."""
    own, scored = own_cases(folds, fold), folds[fold]
    here = subset(data, f"own{fold}", own, scored)
    for start, checkpoint in weights.items():
        described = {"start": start, "epochs": epochs, "seed": seed, "fold": fold, "own": len(own)}
        init = ["--init", str(checkpoint)] if checkpoint else []
        last = train(here, f"init-{start}-e{epochs}-s{seed}-own{fold}", epochs, seed, amp, *init)
        append_rows(path, rows_of(last, here, scored, described))
        if checkpoint and as_they_are:
            append_rows(path, rows_of(checkpoint, here, scored, described | {"epochs": 0, "own": 0}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("phantoms", type=Path, nargs="?", help="preprocessed phantoms")
    parser.add_argument("--weights", type=Path, nargs="+", default=[], help="start from these checkpoints alone")
    parser.add_argument("--amp", choices=AMP_DTYPES, default="bf16")
    parser.add_argument("--epochs", type=int, default=10, help="of the short trainings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--csv", type=Path, default=RESULTS)
    args = parser.parse_args()
    folds = [fold["validation"] for fold in json.loads((args.data / "splits.json").read_text())["folds"]]
    if not (args.phantoms or args.weights):
        parser.error("name the preprocessed phantoms, or --weights to start from")
    given = {path.resolve().parent.name: path.resolve() for path in args.weights}
    for seed, fold in product(args.seeds, range(len(folds))):
        weights = given or make_weights(args.data, args.phantoms, folds, fold, seed, args.amp)
        as_they_are = not given or seed == args.seeds[0]
        measure(args.data, weights, folds, fold, args.epochs, seed, args.amp, args.csv, as_they_are)
    print_table(list(csv.DictReader(args.csv.open(newline=""))))


def print_table(rows: list[dict]):
    """A line per kind of weights; the differences are those of the mean label Dice to random weights."""
    groups = {}
    for row in rows:
        groups.setdefault((row["start"], row["epochs"]), []).append(row)
    scores = {key: scores_of(chosen) for key, chosen in groups.items()}
    print(f"{'weights':10} epochs   {len(LABELS)} labels     WT     TC     ET")
    for (start, epochs), each in scores.items():
        print(f"{start:10} {epochs:>6}  " + "".join(f"{mean:7.3f}" for mean in means(np.array(list(each.values())))))
        if start != "random":
            change, (low, high), better, count = difference(next(iter(scores.values())), each)
            print(f"{'':18} {change[0]:+.3f} [{low[0]:+.3f}, {high[0]:+.3f}]; better in {better} of {count} cases")


if __name__ == "__main__":
    main()
