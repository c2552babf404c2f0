"""Scores on label arrays.

One confusion matrix per case holds all that Dice needs, for labels and regions alike.
"""

import torch

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
