"""What an evaluation leaves behind: tables, figures and report.html, made of what `scoring` has kept of each case."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from models.brats import TARGETS
from models.cost import forward_macs, parameter_count
from models.evaluation.cases import Item
from models.evaluation.plan import Entry, input_shape, training_minutes
from models.evaluation.scoring import Scored, unpack
from models.evaluation.statistics import compare_runs, mean_region_dice, summarise
from models.files import write_atomically, write_csv
from models.plots import prediction_overlay


def summary_of(entries: list[Entry], kept: dict[str, list[Scored]], costs: dict[str, dict], settings: dict) -> dict:
    """What summary.json says.

    Args:
        kept: name of an entry -> what was kept of its cases.
        costs: name of an entry -> what its networks cost (see `costs_of`).
        settings: how all of them were predicted and scored.
    """
    rows = [row for each in kept.values() for one in each for row in one.rows]
    scores = summarise(rows)
    runs = {}
    for entry in entries:
        seconds = [one.seconds for one in kept[entry.name] if one.seconds is not None]
        runs[entry.name] = {
            "split": entry.split,
            "cases": len(kept[entry.name]),
            "trained_on": len({row["case"] for one in kept[entry.name] for row in one.rows if row["trained_on"]}),
            **costs.get(entry.name, {}),
            "forward_seconds_per_case": median(seconds) if seconds else None,
            "scores": scores.get(entry.name, {}),
        }
    return settings | {"runs": runs, "comparisons": compare_runs(rows) if len(scores) > 1 else []}


def costs_of(entry: Entry, networks: list) -> dict:
    """What the networks of an entry are and cost: those of one part together, since the folds take turns."""
    part = entry.parts[0]
    networks = networks[: len(part.runs)]
    return {
        "model": "+".join(dict.fromkeys(run.network for run in part.runs)),
        "epoch": part.runs[0].epoch if len(entry.runs) == 1 else None,
        "parameters": sum(map(parameter_count, networks)),
        "gmac": sum(forward_macs(network, input_shape(part)) for network in networks) / 1e9,
        "training_minutes": training_minutes(entry.runs),
    }


def comparison_table(summary: dict) -> list[dict]:
    """A row per entry and space: the mean of every measure by target, and what the networks cost."""
    rows = []
    for name, run in summary["runs"].items():
        for space, targets in run["scores"].items():
            means = {f"{measure}_{target}": said["mean"] for target, measures in targets.items()
                     for measure, said in measures.items() if isinstance(said, dict) and "mean" in said}  # fmt: skip
            cost = {key: run.get(key) for key in COSTS}
            about = {"run": name, "model": run.get("model"), "split": run["split"], "cases": run["cases"]}
            rows.append({**about, "space": space, **means, **cost})
    return rows


def write_tables(out: Path, summary: dict, kept: dict[str, list[Scored]]):
    """per_case.csv, summary.json and, for several entries, comparison.csv."""
    rows = [row for each in kept.values() for one in each for row in one.rows]
    if rows:
        write_csv(out / "per_case.csv", rows)
    if len(summary["runs"]) > 1 and rows:
        write_csv(out / "comparison.csv", comparison_table(summary))
    write_atomically(out / "summary.json", json.dumps(summary, indent=1))


# ---- pictures ------------------------------------------------------------------------------------------------------


def draw_extremes(name: str, kept: list[Scored], read: Callable[[str], Item], out: Path, prefix: str):
    """overlay_best.png, overlay_median.png and overlay_worst.png by the mean Dice of WT, TC and ET."""
    rows = [row for one in kept for row in one.rows]
    (dice,) = mean_region_dice(rows, rows[0]["space"]).values()
    ranked = sorted(dice, key=dice.get, reverse=True)
    maps = {one.case: one.packed for one in kept}
    for role, case in (("best", ranked[0]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[-1])):
        item = read(case)
        scores = {row["target"]: row["dice"] for row in rows if row["case"] == case}
        title = f"{name}: {role} of {len(ranked)} cases by mean Dice of WT, TC and ET: {case}\nDice, {rows[0]['space']}: "
        title += ", ".join(f"{target} {scores[target]:.3f}" for target in TARGETS)
        prediction_overlay(item.image.numpy(), item.label.numpy(), {"prediction": unpack(maps[case])},
                           out / f"{prefix}overlay_{role}.png", title)  # fmt: skip
