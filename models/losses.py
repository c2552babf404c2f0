"""The loss, and how a network's outputs become probabilities and labels: the one place that knows of the softmax."""

import torch
from monai.losses import DiceCELoss

from models.preprocessing import label_map


def make_loss() -> DiceCELoss:
    """Dice of the three labels plus cross-entropy over all four classes, of logits [B, 4, D, H, W] and labels
    [B, 1, D, H, W]. Background has most voxels, so its Dice would hide the others."""
    return DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)


def probabilities_from_logits(logits: torch.Tensor) -> torch.Tensor:
    """Class probabilities float32 of logits [B, 4, D, H, W] of any type."""
    return logits.float().softmax(1)


def labels_from_logits(logits: torch.Tensor) -> torch.Tensor:
    """Training labels uint8 [B, D, H, W] of logits [B, 4, D, H, W]: the most probable class needs no softmax."""
    return label_map(logits.movedim(1, 0))
