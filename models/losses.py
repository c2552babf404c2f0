"""The loss, and how a network's outputs become probabilities and labels: the one place that knows softmax from sigmoid.

Four output channels are the logits of background and labels, of which a voxel has one: softmax. Three are those of the
regions TC, WT and ET, which overlap: a sigmoid each. The number of channels alone says which.
"""

from collections.abc import Callable

import torch
from monai.losses import DiceCELoss, DiceLoss
from monai.networks.utils import one_hot
from torch.nn.functional import binary_cross_entropy_with_logits

from models.brats import REGION_CHANNELS, REGIONS
from models.preprocessing import label_map


def make_loss() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The loss of logits [B, 4 or 3, D, H, W] and labels [B, 1, D, H, W].

    Of labels: Dice of the three plus cross-entropy over all four classes; background has most voxels, so its Dice would
    hide the others. Of regions: binary cross-entropy of each, and Dice of the three and of NCR and ED as they follow
    from them. Without these two a network fills the core with ET, and loses NCR, for a small price in the Dice of ET.
    """
    of_labels = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    if torch.are_deterministic_algorithms_enabled():  # cross-entropy of class indices is not, on CUDA
        of_one_hot = DiceCELoss(include_background=False, softmax=True)

        def of_labels(logits, label):
            return of_one_hot(logits, one_hot(label, logits.shape[1]))

    # Not DiceCELoss: with several sigmoid channels its cross-entropy is that of a softmax.
    dice = DiceLoss()

    def loss(logits, label):
        if not has_regions(logits):
            return of_labels(logits, label)
        regions = region_masks(label)
        cross_entropy = binary_cross_entropy_with_logits(logits, regions)
        return dice(with_labels(logits.float().sigmoid()), with_labels(regions)) + cross_entropy

    return loss


def has_regions(logits: torch.Tensor) -> bool:
    """Whether logits [B, C, ...] are those of regions."""
    return logits.shape[1] == len(REGION_CHANNELS)


def region_masks(label: torch.Tensor) -> torch.Tensor:
    """Which voxels of training labels [B, 1, ...] are in TC, WT and ET: float32 [B, 3, ...] of zeros and ones."""
    masks = [torch.stack([label == value for value in REGIONS[region]]).any(0) for region in REGION_CHANNELS]
    return torch.cat(masks, 1).float()


def with_labels(regions: torch.Tensor) -> torch.Tensor:
    """Probabilities [B, 3, ...] of TC, WT and ET, and after them those of NCR and ED: [B, 5, ...]."""
    tc, wt, et = regions.split(1, 1)
    return torch.cat((regions, tc * (1 - et), wt * (1 - tc)), 1)


def probabilities_from_logits(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities float32 of logits [B, 4 or 3, ...] of any type: of the classes, or of the regions TC, WT, ET."""
    return logits.float().sigmoid() if has_regions(logits) else logits.float().softmax(1)


def region_probabilities(probabilities: torch.Tensor) -> torch.Tensor:
    """Probabilities [3, ...] of the regions TC, WT, ET from those of classes [4, ...] or regions [3, ...]."""
    if len(probabilities) == len(REGION_CHANNELS):
        return probabilities
    return torch.stack([probabilities[list(REGIONS[region])].sum(0) for region in REGION_CHANNELS])


def logits_from_frequencies(frequencies: torch.Tensor, channels: int) -> torch.Tensor:
    """The logits [channels] with which a network predicts the frequencies [4] of the classes in every voxel."""
    return frequencies.log() if channels == len(frequencies) else region_probabilities(frequencies).logit()


def labels_from_logits(logits: torch.Tensor) -> torch.Tensor:
    """Training labels uint8 [B, ...] of logits [B, 4 or 3, ...]; the most probable class needs no softmax."""
    scores = probabilities_from_logits(logits) if has_regions(logits) else logits
    return label_map(scores.movedim(1, 0))
