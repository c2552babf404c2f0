"""Islands: parts of a predicted tumour that lie apart from it and are far smaller. With one tumour in the head most are
errors, and one of a few voxels costs a case much of its HD95 and of its lesion-wise scores. That is a bet as well:
metastases are many and of any size. Hence off unless asked for.
"""

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from models.lesions import NEIGHBOURS_26


def without_islands(label: Tensor, share: float) -> Tensor:
    """Training labels [D, H, W] without the 26-connected parts of the tumour, all labels together, that have fewer
    voxels than this share of the largest part. A share of 0 leaves all of them."""
    if share == 0:
        return label
    parts, _ = ndimage.label(label.cpu().numpy() > 0, NEIGHBOURS_26)
    voxels = np.bincount(parts.ravel())
    voxels[0] = 0  # the background
    island = torch.from_numpy(voxels < share * voxels.max()).to(label.device)  # [parts + 1]
    return label.masked_fill(island[torch.from_numpy(parts).to(label.device).long()], 0)
