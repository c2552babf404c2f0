"""The small-ET rule: an enhancing tumour below a few tenths of a millilitre is more often an error than a tumour.

Where the truth has no ET, Dice is 0 for a single predicted voxel and 1 for none, so challenge entries relabel a small
ET as NCR. That is a bet on the score: off unless asked for, and its threshold comes from validation cases alone.
"""

import statistics
from itertools import pairwise

import torch
from torch import Tensor

from models.brats import LABELS

NCR, ET = (next(value for value, name in LABELS.items() if name == wanted) for wanted in ("NCR", "ET"))


def small_et_to_ncr(label: Tensor, voxel_ml: float, threshold_ml: float) -> Tensor:
    """Training labels [...] whose ET has become NCR if there is less of it than the threshold; else as they are."""
    et = label == ET
    if int(et.sum()) * voxel_ml >= threshold_ml:
        return label
    return torch.where(et, label.new_tensor(NCR), label)


def choose_small_et_ml(cases: list[tuple[float, float, float]]) -> float:
    """The threshold in ml under which the mean Dice of ET over the cases is highest; 0, which changes nothing, where
    no threshold is better. Of two that are equally good, the lower one.

    Args:
        cases: of each validation case the predicted volume of ET in ml, its Dice of ET as predicted, and that with no
            ET predicted (1 where the truth has none, else 0).

    A threshold lies halfway between the volumes of two cases: it must leave one of them its ET.
    """
    volumes = sorted({predicted_ml for predicted_ml, _, _ in cases})
    thresholds = [0.0, *((low + high) / 2 for low, high in pairwise(volumes))]

    def mean_dice(threshold_ml):
        return statistics.fmean(
            without if predicted_ml < threshold_ml else dice for predicted_ml, dice, without in cases
        )

    return max(thresholds, key=mean_dice)  # the first of the best
