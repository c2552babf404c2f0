"""Scores on label arrays, and what a table of them says.

One confusion matrix per case holds all that Dice needs, for labels and regions alike.
"""

import statistics

import torch
from scipy.stats import wilcoxon

from models.brats import LABELS, TARGETS


def confusion(prediction: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Voxel counts int64 [4, 4] (rows truth, columns prediction) of two maps of training labels of one shape."""
    classes = len(LABELS) + 1
    pairs = label.reshape(-1).long() * classes + prediction.reshape(-1)
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def dice_per_target(counts: torch.Tensor) -> dict[str, float]:
    """Dice of WT, TC, ET, NCR, ED from a confusion matrix [4, 4]: 1 where truth and prediction are both empty, 0 where
    one of them is."""
    scores = {}
    for target, (overlap, predicted, true) in volumes_per_target(counts).items():
        scores[target] = 2 * overlap / (predicted + true) if predicted + true else 1.0
    return scores


def volumes_per_target(counts: torch.Tensor) -> dict[str, tuple[int, int, int]]:
    """(overlap, predicted, true) in voxels for each target."""
    counts = counts.cpu()
    return {
        target: (
            int(counts[list(labels)][:, list(labels)].sum()),
            int(counts[:, list(labels)].sum()),
            int(counts[list(labels)].sum()),
        )
        for target, labels in TARGETS.items()
    }


def mean_label_dice(dice: dict[str, float]) -> float:
    """The mean over NCR, ED and ET: what chooses the best checkpoint."""
    return sum(dice[name] for name in LABELS.values()) / len(LABELS)


# ---- tables of scores ----------------------------------------------------------------------------------------------
# A table is a list of rows {"run", "case", "space", "target", "dice", "predicted_ml", "true_ml"}, one per score.


def summarise(rows: list[dict]) -> dict:
    """Per space and target: mean, standard deviation, median and range of the Dice, and how often a mask was empty."""
    summary = {}
    for space in sorted({row["space"] for row in rows}):
        summary[space] = {}
        for target in dict.fromkeys(row["target"] for row in rows):
            chosen = [row for row in rows if row["space"] == space and row["target"] == target]
            dice = [row["dice"] for row in chosen]
            empty = [(row["predicted_ml"] == 0) + (row["true_ml"] == 0) for row in chosen]
            summary[space][target] = {
                "mean": statistics.fmean(dice),
                "sd": statistics.stdev(dice) if len(dice) > 1 else 0.0,
                "median": statistics.median(dice),
                "min": min(dice),
                "max": max(dice),
                "both_empty": empty.count(2),
                "one_empty": empty.count(1),
            }
    return summary


def compare(rows: list[dict], first: str, second: str) -> list[dict]:
    """Per space and target, how the Dice of the run `second` differs from that of `first` on the same cases: the mean
    difference and the p-value of Wilcoxon's two-sided signed-rank test (1 where no case differs)."""
    scores = {(row["run"], row["space"], row["target"], row["case"]): row["dice"] for row in rows}
    compared = []
    for space, target in dict.fromkeys((row["space"], row["target"]) for row in rows):
        cases = [row["case"] for row in rows if (row["run"], row["space"], row["target"]) == (first, space, target)]
        differences = [scores[second, space, target, case] - scores[first, space, target, case] for case in cases]
        compared.append({
            "first": first, "second": second, "space": space, "target": target, "cases": len(cases),
            "mean_difference": statistics.fmean(differences),
            "wilcoxon_p": float(wilcoxon(differences).pvalue) if any(differences) else 1.0,
        })  # fmt: skip
    return compared
