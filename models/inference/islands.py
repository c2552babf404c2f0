"""Islands: parts of a predicted region that lie apart from the others and are far smaller than the largest. With one
tumour in the head most are errors, and one of a few voxels costs a case much of its HD95 and of its lesion-wise scores.
That is a bet: metastases are many and of any size. Hence off unless asked for.
"""

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from models.brats import LABELS, REGIONS
from models.lesions import NEIGHBOURS_26

VALUES = {name: value for value, name in LABELS.items()}
INSTEAD = {"WT": 0, "TC": VALUES["ED"], "ET": VALUES["NCR"]}  # what the islands of a region become, the largest first


def without_islands(label: Tensor, share: float) -> Tensor:
    """Training labels [D, H, W] whose islands have become background (of WT), ED (of TC) or NCR (of ET): 26-connected
    parts that have fewer voxels than this share of the largest part of the region. A share of 0 leaves all of them."""
    if share == 0 or not label.any():
        return label
    labels = label.cpu().numpy().copy()
    (box,) = ndimage.find_objects((labels > 0).view(np.uint8))
    tumour = labels[box]  # a view
    for region, instead in INSTEAD.items():
        parts, _ = ndimage.label(np.isin(tumour, REGIONS[region]), NEIGHBOURS_26)
        voxels = np.bincount(parts.ravel())
        voxels[0] = 0  # what is outside the region
        island = voxels < share * voxels.max()
        island[0] = False
        tumour[island[parts]] = instead
    return torch.from_numpy(labels).to(label.device)
