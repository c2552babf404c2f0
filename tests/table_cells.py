"""What the tables of README.md, RESULTS.md and the model cards share: rows of the CSV files, and cells made of them."""

import csv
import json
import re
from pathlib import Path
from statistics import fmean, median

import numpy as np

ROOT = Path(__file__).parent.parent
TESTS = "tests/benchmarks/results"
FOLDS = "models/unet/results/phantoms-real-96-fold0"  # holds the cross-validation of both networks, seed 0
MORE_SEEDS = "models/unet/results/phantoms-real-96-seed1-fold0"  # the same of seeds 1 and 2
SCORES = "evaluation-cross-validation/per_case.csv"
NETWORKS = {"unet": "U-Net", "swinunetr": "Swin UNETR"}
ROWS = {network: f"{network}-phantoms-real-96" for network in NETWORKS}  # what the folds are called there
SETS = ("AVX2", "AVX-512 with bf16")  # the instruction sets that have a column
REGIONS = ("WT", "TC", "ET")


def read(path: str, device: str = "", **wanted: str) -> list[dict]:
    """The rows of a CSV file that have the `wanted` values. With the name of the column that tells the `device`, only
    those of the last commit that measured each device: benchmarks append."""
    with (ROOT / path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if device:
        last = {row[device]: row["commit"] for row in rows}
        rows = [row for row in rows if row["commit"] == last[row[device]]]
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def instruction_set(device: str) -> str:
    """One of SETS, from "AMD EPYC (AVX2), 2 threads", "AMD EPYC (avx512_bf16)" or "avx512_bf16"; else the device."""
    name = (re.findall(r"\(([^()]*)\)", device) or [device])[-1].upper()
    if "AVX2" in name:
        return SETS[0]
    return SETS[1] if "AVX512" in name and "BF16" in name else device


def by_set(rows: list[dict], device: str = "device") -> dict[str, list[dict]]:
    groups = {}
    for row in rows:
        groups.setdefault(instruction_set(row[device]), []).append(row)
    return groups


def middle(rows: list[dict], column: str) -> float:
    return median(float(row[column]) for row in rows)


def table(header: str, rows: list[list[str]]) -> list[str]:
    names = header.split(", ")
    return [f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *rows)]


def source(path: str, rows: list[dict]) -> str:
    """A link to the file, and the commits of the rows that were taken from it."""
    commits = dict.fromkeys(row["commit"][:7] + "-dirty" * row["commit"].endswith("-dirty") for row in rows)
    return f"[csv]({path}) " + ", ".join(f"`{commit}`" for commit in commits)


def commit_of(run: str) -> dict[str, str]:
    return {"commit": json.loads((ROOT / run / "config.json").read_text(encoding="utf-8"))["git_commit"]}


def seconds(value: float) -> str:
    number, unit = (1e3 * value, "ms") if value < 1 else (value, "s")
    return f"{number:,.{0 if number >= 100 else 1 if number >= 10 else 2}f} {unit}"


def over_seeds(values: list[float], digits: int = 3) -> str:
    """Their mean, and their standard deviation if there are several."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


def regions_over_seeds(values: dict[str, list[float]]) -> str:
    return ", ".join(f"{region} {over_seeds(values[region])}" for region in REGIONS)


def folds_of(network: str, target: str, measure: str) -> np.ndarray:
    """Float [3 seeds, 12 cases]: scores of the cross-validation of a network."""
    files = {0: FOLDS, 1: MORE_SEEDS, 2: MORE_SEEDS}
    seeds = []
    for seed, folder in files.items():
        run = ROWS[network] + f"-seed{seed}" * (seed > 0)
        rows = read(f"{folder}/{SCORES}", run=run, target=target)
        seeds.append({row["case"]: float(row[measure]) for row in rows})
    return np.array([[scores[case] for case in sorted(seeds[0])] for scores in seeds])


def dice_of_folds(network: str) -> str:
    return regions_over_seeds({region: [*folds_of(network, region, "dice").mean(1)] for region in REGIONS})


def source_of_folds(network: str) -> str:
    runs = [commit_of(folder.replace("unet", network, 1)) for folder in (FOLDS, MORE_SEEDS)]
    return f"{source(f'{FOLDS}/{SCORES}', runs[:1])}, {source(f'{MORE_SEEDS}/{SCORES}', runs[1:])}"
