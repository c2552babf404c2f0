"""Scores and pictures of trained runs on preprocessed cases; the rows of per_case.csv are made here.

A run under evaluation has a name in the tables and members: (network, Run) pairs, one, or all of an ensemble, whose
probabilities are averaged.
"""

import csv
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from models.brats import REGIONS, TARGETS
from models.cost import forward_macs, parameter_count
from models.dataset import load_case, manifest_checksum, read_split
from models.device import inference_dtype
from models.errors import InputError
from models.inference.engines import choose_engine
from models.inference.predict import predict
from models.labels import to_raw_labels, to_training_labels
from models.metrics import confusion, dice_per_target, mean_label_dice, volumes_per_target
from models.nifti import write_label_nifti
from models.plots import paired_dice, prediction_overlay
from models.preprocessing import label_map, native_label_map, network_spacing_mm
from models.runs import Run
from models.volumes import read_case

ENSEMBLE = "ensemble"

# ---- what is evaluated ---------------------------------------------------------------------------------------------


def names_of(runs: list[Run], ensemble: bool) -> list[str]:
    """What each run is called in the tables: its folder's name, with the network's before it where two are the same.
    InputError for a run given twice and for two of one name."""
    for index, run in enumerate(runs):
        if any(run.checkpoint.resolve() == other.checkpoint.resolve() for other in runs[:index]):
            raise InputError(f"{run.checkpoint}: given twice. Name each run once.")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.network}-{run.name}" for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two runs are both called {name}: rename the folder of one of them.")
        if ensemble and name == ENSEMBLE:
            raise InputError(f"--ensemble: a run is called {ENSEMBLE} as well. Rename its folder.")
    return names


def choose_cases(runs: list[Run], data: Path | None, split: str) -> tuple[Path, list[str]]:
    """The data folder (`data`, if that is given) and the cases of the split, as each run recorded them. InputError for
    runs that differ in them."""
    chosen = []
    for run in runs:
        folder = data or run.data or Path("data/preprocessed_tensors")
        checksum = manifest_checksum(folder)
        if run.data_sha256 not in (checksum, None):
            print(f"Note: {folder} is not what {run.folder} was trained on (its manifest differs).")
        chosen.append((folder, checksum, run.split[split] if run.split else read_split(folder)[split]))
    first_folder, first_checksum, cases = chosen[0]
    for run, (folder, checksum, names) in zip(runs, chosen, strict=True):
        if names != cases:
            raise InputError(f"{run.folder} and {runs[0].folder} have different {split} cases, so their scores do not "
                             "compare.")  # fmt: skip
        if checksum != first_checksum:
            raise InputError(f"{run.folder} was trained on {folder} and {runs[0].folder} on {first_folder}: say which "
                             "with --data.")  # fmt: skip
    return first_folder, cases


def costs(networks: list, data: Path, case: str) -> dict:
    """Parameters, and GMAC per volume, of the networks together."""
    shape = (1, *load_case(data / f"{case}.pt", as_stored=True)["image"].shape)
    return {
        "parameters": sum(map(parameter_count, networks)),
        "gmac": sum(forward_macs(network, shape) for network in networks) / 1e9,
    }


def training_minutes(run: Run) -> float | None:
    """As its train.csv says; None where there is none."""
    log = run.folder / "train.csv"
    if not log.is_file():
        return None
    with log.open(newline="") as file:
        return sum(float(row["seconds"]) for row in csv.DictReader(file)) / 60


# ---- scores --------------------------------------------------------------------------------------------------------


def predict_cases(
    members: list[tuple], data: Path, names: list[str], device: torch.device, engine: str, amp: str, flips: bool
) -> Iterator[tuple[dict, torch.Tensor, torch.Tensor, float]]:
    """Yield (case, the mean of the members' probabilities [4, D, H, W], its label map on the CPU, seconds) for each
    case. `engine` and `amp` are --engine and --amp."""
    dtypes = [inference_dtype(amp, run.amp, device) for _, run in members]
    image = load_case(data / f"{names[0]}.pt")["image"].to(device)
    networks = [choose_engine(network, engine, dtype, image.shape[-1], device)
                for (network, _), dtype in zip(members, dtypes, strict=True)]  # fmt: skip
    for network, dtype in zip(networks, dtypes, strict=True):
        predict(network, image, dtype)  # the first pass of a process is slower: it is not timed
    for name in names:
        case = load_case(data / f"{name}.pt")
        if "label" not in case:
            raise InputError(f"{data / name}.pt: has no label, so it cannot be scored.")
        image = case["image"].to(device)
        start = time.perf_counter()
        predicted = [predict(network, image, dtype, flips) for network, dtype in zip(networks, dtypes, strict=True)]
        probabilities = sum(predicted) / len(predicted)
        label = label_map(probabilities).cpu()  # waits for the device
        yield case, probabilities, label, time.perf_counter() - start


def score_run(run: str, predictions, count: int, raw: dict | None, nifti: Path | None, suffix: str):
    """Score what `predict_cases` yields, `count` cases, in network space; with `raw` (name -> Case) in native space,
    too. Label maps of native space go to the folder `nifti`, named after case and `suffix`.

    Returns rows for per_case.csv, case -> label map uint8 [D, H, W], and seconds per case.
    """
    rows, maps, seconds = [], {}, []
    for case, probabilities, label, spent_s in tqdm(predictions, desc=run, unit="case", total=count):
        name, geometry, scheme = case["case"], case["geometry"], case["label_scheme"]
        maps[name] = label.numpy()
        seconds.append(spent_s)
        voxel_ml = float(np.prod(network_spacing_mm(geometry))) / 1e3
        rows += score_case(run, name, "network", label, case["label"][0], voxel_ml)
        if raw is None and not nifti:
            continue
        native = native_label_map(probabilities.cpu(), geometry)  # [X, Y, Z]
        if raw is not None and raw[name].labelled:
            truth = torch.from_numpy(to_training_labels(read_case(raw[name]).label, scheme, name))
            voxel_ml = abs(float(np.linalg.det(np.array(geometry["affine"])[:3, :3]))) / 1e3
            rows += score_case(run, name, "native", native, truth, voxel_ml)
        if nifti:
            values = to_raw_labels(native.numpy(), scheme)
            write_label_nifti(nifti / f"{name}{suffix}.nii.gz", values, np.array(geometry["affine"]))
    return rows, maps, seconds


def score_case(run: str, case: str, space: str, prediction, truth, voxel_ml: float) -> list[dict]:
    counts = confusion(prediction, truth)
    dice, volumes = dice_per_target(counts), volumes_per_target(counts)
    return [
        {"run": run, "case": case, "space": space, "target": target, "dice": dice[target],
         "predicted_ml": volumes[target][1] * voxel_ml, "true_ml": volumes[target][2] * voxel_ml}
        for target in dice
    ]  # fmt: skip


def dice_of_cases(rows: list[dict], run: str) -> dict[str, dict[str, float]]:
    """case -> target -> Dice of one run in network space."""
    dice = {}
    for row in rows:
        if row["run"] == run and row["space"] == "network":
            dice.setdefault(row["case"], {})[row["target"]] = row["dice"]
    return dice


# ---- pictures ------------------------------------------------------------------------------------------------------


def draw_extremes(run: str, rows: list[dict], maps: dict, data: Path, out: Path, prefix: str):
    """overlay_best.png, overlay_median.png and overlay_worst.png by mean label Dice of network space."""
    dice = dice_of_cases(rows, run)
    ranked = sorted(dice, key=lambda case: mean_label_dice(dice[case]), reverse=True)
    for role, name in (("best", ranked[0]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[-1])):
        case = load_case(data / f"{name}.pt")
        scores = ", ".join(f"{target} {dice[name][target]:.3f}" for target in TARGETS)
        title = f"{run}: {role} of {len(ranked)} cases by mean label Dice: {name}\nDice {scores}"
        path = out / f"{prefix}overlay_{role}.png"
        prediction_overlay(case["image"].numpy(), case["label"][0].numpy(), {"prediction": maps[name]}, path, title)


def draw_comparison(summary: dict, rows: list[dict], maps: dict, data: Path, out: Path):
    """comparison_dice.png, and comparison_overlay_1.png to _3.png: the cases whose mean label Dice differs most between
    the first run and another."""
    dice = {run: dice_of_cases(rows, run) for run in summary["runs"]}
    first, *others = dice
    tests = [row for row in summary["comparisons"] if row["space"] == "network"]
    notes = {region: "Wilcoxon p " + ", ".join(f"{row['wilcoxon_p']:.2g}" for row in tests if row["target"] == region)
             for region in REGIONS}  # fmt: skip
    scores = {region: {run: [case[region] for case in cases.values()] for run, cases in dice.items()}
              for region in REGIONS}  # fmt: skip
    cases = f"{summary['cases']} {summary['split']} case{'s' * (summary['cases'] != 1)}"
    title = f"{cases}; each run tested against {first}"
    paired_dice(scores, out / "comparison_dice.png", title, notes)

    means = {run: {case: mean_label_dice(scores) for case, scores in cases.items()} for run, cases in dice.items()}
    spread = {case: max(abs(means[run][case] - means[first][case]) for run in others) for case in means[first]}
    for place, name in enumerate(sorted(spread, key=spread.get, reverse=True)[:3], start=1):
        case = load_case(data / f"{name}.pt")
        title = f"{name}, number {place} of the cases that differ most\nmean label Dice "
        title += ", ".join(f"{run} {means[run][name]:.3f}" for run in means)
        path = out / f"comparison_overlay_{place}.png"
        shown = {run: maps[run][name] for run in maps}
        prediction_overlay(case["image"].numpy(), case["label"][0].numpy(), shown, path, title)
