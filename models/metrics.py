"""Scores of label maps.

`score_case` computes everything that is reported of a case, on arrays in millimetres. Training needs Dice alone, on its
own device: one confusion matrix of tensors holds all of it. Nothing here imports torch, so that the processes that
score cases start fast.
"""

import math
from typing import TYPE_CHECKING

import numpy as np

from models.brats import LABELS, REGIONS, TARGETS
from models.labels import occupied_box
from models.lesions import EMPTY_MM, SURROUNDINGS_2023, find_parts, score_2023, score_2026
from models.surfaces import hd95, surface_dice, surfaces

if TYPE_CHECKING:
    import torch

# (something is predicted, something is true) -> which of the masks is empty
EMPTY = {(False, False): "both", (False, True): "prediction", (True, False): "truth", (True, True): ""}

# ---- one case ------------------------------------------------------------------------------------------------------


def score_case(prediction: np.ndarray, truth: np.ndarray, spacing_mm) -> dict[str, dict]:
    """Everything that is reported of a case: {target: {column: value}} for WT, TC, ET, NCR and ED.

    `prediction` and `truth` are training labels, uint8 [X, Y, Z] of one grid; `spacing_mm` is the size of its voxels
    along the axes of the arrays. Columns, in this order:

    * dice, sensitivity, precision
    * hd95_mm: the 95th percentile of the distances of all border voxels, of both masks, from the other's border
    * nsd_1mm: normalised surface Dice, the mean of both masks' shares of border voxels within 1 mm of the other's
    * nsd_0mm: the same with the voxels that both borders have, which the official package of BraTS 2026 gives as
      `global_nsd` (it takes half a voxel as the tolerance, and the smallest side of a voxel only for single lesions)
    * predicted_ml, true_ml, volume_error_ml (predicted - true)
    * empty: "" or which mask is empty, "both", "prediction" or "truth". Then a rule decides: both empty is 1 and 0 mm,
      one empty 0 and 374 mm.
    * lesion2026_..., lesion2023_...: see models/lesions.py. BraTS 2023 does not score NCR and ED: None.

    Deviations of the first group from the official package: where both masks are empty, it leaves the case out; where
    one is, or where they do not overlap, it has 373 mm; and it measures hd95 and `global_nsd` in voxels, whatever
    their size. Up to 2023, HD95 was the larger of the two masks' percentiles.
    """
    # A header's float32 may say 1.0000001 mm, and a tolerance of 1 mm would miss the next voxel.
    spacing_mm = np.round(np.asarray(spacing_mm, float), 6)
    box = _box_with_surroundings(prediction | truth)
    prediction, truth = prediction[box], truth[box]
    return {
        target: _score_target(np.isin(prediction, labels), np.isin(truth, labels), spacing_mm, target in REGIONS)
        for target, labels in TARGETS.items()
    }


def _score_target(predicted: np.ndarray, true: np.ndarray, spacing_mm, is_region: bool) -> dict:
    """One target's columns, from its masks, bool [X, Y, Z]."""
    box = _box_with_surroundings(predicted | true)
    predicted, true = predicted[box], true[box]
    voxels, true_voxels, overlap = (int(np.count_nonzero(mask)) for mask in (predicted, true, predicted & true))
    both = surfaces(predicted, true, spacing_mm)
    if voxels and true_voxels:
        distances = [surface.distance_mm for surface in both]
        scores = {
            "dice": 2 * overlap / (voxels + true_voxels),
            "sensitivity": overlap / true_voxels,
            "precision": overlap / voxels,
            "hd95_mm": hd95(*distances),
            "nsd_1mm": surface_dice(*distances, 1.0),
            "nsd_0mm": surface_dice(*distances, 0.0),
        }
    else:
        share, distance_mm = (0.0, EMPTY_MM) if voxels or true_voxels else (1.0, 0.0)
        scores = dict.fromkeys(("dice", "sensitivity", "precision", "hd95_mm", "nsd_1mm", "nsd_0mm"), share)
        scores["hd95_mm"] = distance_mm
    ml = float(np.prod(spacing_mm)) / 1000
    scores |= {"predicted_ml": voxels * ml, "true_ml": true_voxels * ml, "volume_error_ml": (voxels - true_voxels) * ml}
    scores["empty"] = EMPTY[voxels > 0, true_voxels > 0]
    parts = [find_parts(mask, surface) for mask, surface in zip((predicted, true), both, strict=True)]
    lesions = score_2023(*parts, spacing_mm) if is_region else dict.fromkeys(("dice", "hd95_mm", "tp", "fp", "fn"))
    scores |= {f"lesion2026_{column}": value for column, value in score_2026(*parts, spacing_mm).items()}
    return scores | {f"lesion2023_{column}": value for column, value in lesions.items()}


def _box_with_surroundings(volume: np.ndarray) -> tuple[slice, ...]:
    """The box that holds every non-zero voxel of [X, Y, Z] and the surroundings of the lesions."""
    return tuple(slice(max(0, low - SURROUNDINGS_2023), high + SURROUNDINGS_2023) for low, high in occupied_box(volume))


# ---- Dice while training --------------------------------------------------------------------------------------------


def confusion(prediction: "torch.Tensor", label: "torch.Tensor") -> "torch.Tensor":
    """Voxel counts int64 [4, 4] (rows truth, columns prediction) of two maps of training labels of one shape."""
    classes = len(LABELS) + 1
    pairs = label.reshape(-1).long() * classes + prediction.reshape(-1)
    return pairs.bincount(minlength=classes**2).reshape(classes, classes)


def dice_per_target(counts: "torch.Tensor") -> dict[str, float]:
    """Dice of WT, TC, ET, NCR, ED from a confusion matrix [4, 4]: 1 where truth and prediction are both empty, 0 where
    one of them is."""
    scores = {}
    for target, (overlap, predicted, true) in volumes_per_target(counts).items():
        scores[target] = 2 * overlap / (predicted + true) if predicted + true else 1.0
    return scores


def volumes_per_target(counts: "torch.Tensor") -> dict[str, tuple[int, int, int]]:
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


def pooled_dice(counts: "torch.Tensor") -> dict[str, float]:
    """Dice of the voxels of all cases together, from their confusion matrices [N, 4, 4], by which the best checkpoint
    is chosen. WT, TC, ET, NCR and ED are nan if no truth has any; "mean" is over the labels that some truth has.

    The mean over cases would depend on the rule for empty masks: predicting nothing gives 1 for a label that a case
    lacks.
    """
    scores = {
        target: 2 * overlap / (predicted + true) if true else math.nan
        for target, (overlap, predicted, true) in volumes_per_target(counts.sum(0)).items()
    }
    found = [scores[name] for name in LABELS.values() if not math.isnan(scores[name])]
    return {"mean": sum(found) / len(found) if found else math.nan} | scores


def mean_label_dice(dice: dict[str, float]) -> float:
    """The mean over NCR, ED and ET of one case."""
    return sum(dice[name] for name in LABELS.values()) / len(LABELS)
