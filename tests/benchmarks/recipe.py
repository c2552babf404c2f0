#!/usr/bin/env python3
"""What a change of the training is worth: cross-validated trainings of named variants on the same few cases.

  python preprocess_brats.py REAL DATA --size 64 --folds 4 --test-share 0
  python tests/benchmarks/recipe.py DATA --variants baseline full-8 --seeds 0 1 --epochs 20
  python tests/benchmarks/recipe.py DATA OTHER_DATA --variants baseline --epochs 20 --table

A variant is a training script with its flags. The script itself trains it on each fold, in a process of its own, into
models/<network>/results/recipe-<variant>-<data>-e<epochs>-s<seed>-fold<k>. What is finished is skipped and what was
interrupted goes on, so this can be killed and started again. Each validation case adds a row per target to the CSV: its
Dice after the last epoch, which counts, and after the best one, which was chosen on these very cases.

The table at the end has means over cases (of each first over the seeds) and, for the difference to its first line, the
interval that holds 95 % of 10,000 resamplings of the cases. A case whose truth has no voxel of a label is left out of
that label's mean.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

from models.brats import LABELS, TARGETS
from models.dataset import read_split
from models.device import AMP_DTYPES, choose_device, device_name
from models.files import git_commit
from models.inference.predict import predict
from models.metrics import confusion, dice_per_target
from models.preprocessing import label_map
from models.runs import load_model, open_run, read_record
from models.tensors import load_case

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "recipe.csv"
COMMON = "--batch-size 2 --learning-rate 3e-3"  # flags of all variants, before their own
FULL_8 = "--variant full-resolution --channels 8 32 64 128 256"
FOLDED_8 = "--variant space-to-depth --channels 8 32 64 128 256 --residual"
SWIN = "--feature-size 12 --window-size 4"
VARIANTS = {  # name: training script, its flags
    "baseline": ("train_unet.py", ""),
    "baseline-1e-3": ("train_unet.py", "--learning-rate 1e-3"),
    "baseline-batch-1": ("train_unet.py", "--batch-size 1"),
    "baseline-regions": ("train_unet.py", "--regions"),
    "baseline-strong": ("train_unet.py", "--augmentation strong"),
    "baseline-paste": ("train_unet.py", "--copy-paste 0.3"),
    "baseline-ema": ("train_unet.py", "--ema 0.99"),
    "baseline-phantoms": ("train_unet.py", "--init models/unet/results/phantoms-64/last.pt"),  # see RESULTS.md
    "baseline-heads": ("train_unet.py", "--init unet-heads"),
    "baseline-varied": ("train_unet.py", "--init models/unet/results/varied-64/last.pt"),
    "full-16": ("train_unet.py", "--variant full-resolution --channels 16 32 64 128 256"),
    "full-16-thin": ("train_unet.py", "--variant full-resolution --channels 16 16 32 64 128"),
    "full-8": ("train_unet.py", FULL_8),
    "full-8-1e-3": ("train_unet.py", f"{FULL_8} --learning-rate 1e-3"),
    "full-8-one": ("train_unet.py", f"{FULL_8} --convolutions 1 1 2 2 2"),
    "full-8-thin": ("train_unet.py", "--variant full-resolution --channels 8 16 32 64 128"),
    "folded-8": ("train_unet.py", FOLDED_8),
    "swin": ("train_swinunetr.py", f"{SWIN} --no-v2"),
    "swin-v2": ("train_swinunetr.py", SWIN),
    "swin-v2-heads": ("train_swinunetr.py", f"{SWIN} --init swinunetr-heads"),
    "swin-drop-path": ("train_swinunetr.py", f"{SWIN} --no-v2 --drop-path 0.1 --weight-decay 0.05"),
    "swin-no-attention": ("train_swinunetr.py", f"{SWIN} --no-v2 --no-attention"),
}
COLUMNS = (*LABELS.values(), "WT", "TC")  # of the arrays of scores; ET is a label and a region


# ---- training and scoring ------------------------------------------------------------------------------------------


def flags_of(variant: str, amp: str) -> str:
    return f"{COMMON} --amp {amp} {VARIANTS[variant][1]}".strip()


def train(variant: str, data: Path, epochs: int, seed: int, fold: int, amp: str) -> Path:
    """Train one fold, or what is left of it; returns the run's folder."""
    script = VARIANTS[variant][0]
    network = script.removeprefix("train_").removesuffix(".py")
    name = f"recipe-{variant}-{data.name}-e{epochs}-s{seed}-fold{fold}"
    folder = ROOT / "models" / network / "results" / name
    last = folder / "last.pt"
    done = open_run(last).epoch if last.exists() else 0
    if done < epochs:
        command = [sys.executable, script, data.resolve(), "--fold", fold, "--seed", seed, "--epochs", epochs,
                   "--run-name", name, *flags_of(variant, amp).split(), *["--resume"] * (done > 0)]  # fmt: skip
        result = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"{' '.join(map(str, command))}\n{result.stderr[-3000:]}")
    return folder


def dice_of_cases(checkpoint: Path, data: Path, names: list[str], device: torch.device) -> dict[str, dict[str, float]]:
    """case -> target -> Dice in network space."""
    model, content = load_model(checkpoint, device)
    dice = {}
    for name in names:
        case = load_case(data / f"{name}.pt")
        prediction = label_map(predict(model, case["image"].to(device), AMP_DTYPES[content["amp"]])).cpu()
        dice[name] = dice_per_target(confusion(prediction, case["label"][0]))
    return dice


def rows_of(folder: Path, data: Path, fold: int, device: torch.device) -> list[dict]:
    """The rows of one trained fold, a row per validation case and target."""
    names, record = read_split(data, fold)["validation"], read_record(folder)
    last, best = (dice_of_cases(folder / file, data, names, device) for file in ("last.pt", "best.pt"))
    with (folder / "train.csv").open(newline="") as file:
        epochs = list(csv.DictReader(file))
    common = {
        "best_epoch": open_run(folder / "best.pt").epoch,
        "step_ms": f"{median(float(row['step_ms']) for row in epochs[1:] or epochs):.1f}",
        "minutes": f"{sum(float(row['seconds']) for row in epochs) / 60:.2f}",
        "gmac": f"{record['gmac']:.2f}",
        "parameters": record["parameters"],
        "device": device_name(device),
        "commit": git_commit(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    rows = []
    for name in names:
        label = load_case(data / f"{name}.pt")["label"]
        rows += [
            {"case": name, "target": target, "true_voxels": int(torch.isin(label, torch.tensor(values)).sum()),
             "dice_last": f"{last[name][target]:.4f}", "dice_best": f"{best[name][target]:.4f}", **common}
            for target, values in TARGETS.items()
        ]  # fmt: skip
    return rows


def append(path: Path, rows: list[dict]):
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict]:
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


# ---- the table -----------------------------------------------------------------------------------------------------


def scores_of(rows: list[dict]) -> dict[str, np.ndarray]:
    """case -> Dice after the last epoch [COLUMNS], the mean over the seeds; NaN where the truth is empty."""
    scores = {}
    for case in sorted({row["case"] for row in rows}):
        dice = {column: [] for column in COLUMNS}
        for row in rows:
            if row["case"] == case and row["target"] in dice:
                dice[row["target"]].append(float(row["dice_last"]) if int(row["true_voxels"]) else np.nan)
        scores[case] = np.array([np.mean(dice[column]) for column in COLUMNS])
    return scores


def means(scores: np.ndarray) -> np.ndarray:
    """Scores [..., cases, COLUMNS] -> means [..., 4]: of the labels, WT, TC, ET."""
    per_column = np.nanmean(scores, axis=-2)
    wt, tc, et = (per_column[..., COLUMNS.index(region)] for region in ("WT", "TC", "ET"))
    return np.stack([per_column[..., : len(LABELS)].mean(-1), wt, tc, et], -1)


def difference(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, int, int]:
    """How much better `second` is on the cases that both have: the differences [4] of the means, their intervals
    [2, 4], the number of cases whose mean label Dice is higher, and of all."""
    shared = sorted(first.keys() & second.keys())
    a, b = (np.array([scores[case] for case in shared]) for scores in (first, second))
    picked = np.random.default_rng(0).integers(len(shared), size=(10_000, len(shared)))
    intervals = np.nanpercentile(means(b[picked]) - means(a[picked]), (2.5, 97.5), axis=0)
    a_mean, b_mean = (np.nanmean(scores[:, : len(LABELS)], axis=1) for scores in (a, b))
    return means(b) - means(a), intervals, int((b_mean > a_mean).sum()), len(shared)


def print_table(rows: dict[str, list[dict]]):
    """A line per name of variant and data; the differences are those to the first."""
    print(f"{'':34} seeds cases    mean     WT     TC     ET    GMAC  million  ms/step")
    scores = {name: scores_of(chosen) for name, chosen in rows.items()}
    first = next(iter(scores))
    for name, chosen in rows.items():
        averages = " ".join(f"{mean:6.3f}" for mean in means(np.array(list(scores[name].values()))))
        seeds, step_ms = len({row["seed"] for row in chosen}), median(float(row["step_ms"]) for row in chosen)
        gmac, millions = float(chosen[0]["gmac"]), int(chosen[0]["parameters"]) / 1e6
        print(f"{name:34} {seeds:5} {len(scores[name]):5}  {averages} {gmac:7.1f} {millions:8.2f} {step_ms:8.0f}")
        if name != first:
            changes, (low, high), better, count = difference(scores[first], scores[name])
            each = zip(("mean", "WT", "TC", "ET"), changes, low, high, strict=True)
            said = ", ".join(f"{what} {change:+.3f} [{a:+.3f}, {b:+.3f}]" for what, change, a, b in each)
            print(f"{'':12}{said}; better in {better} of {count} cases")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--amp", choices=AMP_DTYPES, default="bf16", help="the same for all rows that are to compare")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="train nothing: only print the table")
    args = parser.parse_args()
    device = choose_device("auto")
    folds = range(len(json.loads((args.data[0] / "splits.json").read_text())["folds"]))
    # All variants of a fold before the next fold: stopped early, they still compare.
    jobs = [] if args.table else product(args.seeds, folds, args.data, args.variants)
    for seed, fold, data, variant in jobs:
        job = {"variant": variant, "data": data.name, "epochs": args.epochs, "seed": seed, "fold": fold}
        if any(all(row[key] == str(value) for key, value in job.items()) for row in read(args.csv)):
            continue
        print(f"{time.strftime('%H:%M:%S')} {', '.join(f'{key} {value}' for key, value in job.items())}", flush=True)
        folder = train(variant, data, args.epochs, seed, fold, args.amp)
        described = job | {"script": VARIANTS[variant][0], "flags": flags_of(variant, args.amp)}
        append(args.csv, [described | row for row in rows_of(folder, data, fold, device)])
    rows = {}
    for row in read(args.csv):
        if int(row["epochs"]) == args.epochs:
            rows.setdefault((row["variant"], row["data"]), []).append(row)
    wanted = [(variant, data.name) for data, variant in product(args.data, args.variants)]
    if any(key in rows for key in wanted):
        print_table({" ".join(key): rows[key] for key in wanted if key in rows})


if __name__ == "__main__":
    main()
