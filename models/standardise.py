"""What networks do first with an image of 0 to 1, unless they were trained without it: the same contrast in every case.

The percentiles of preprocessing give all cases the same range, but not the same mean: half of a head can be brighter
in one scanner than all of it in another. What it is worth stands in tests/benchmarks/RESULTS.md.
"""

from torch import Tensor

SMALLEST_DEVIATION = 1e-3  # a modality of one value stays finite


def standardise(image: Tensor) -> Tensor:
    """Each modality of each case minus its mean over the head, divided by its standard deviation there; 0 around it.

    The image [B, C, D, H, W] is 0 around the head: that is where any of its modalities is above 0. Computed in float32,
    returned in the type of the image.
    """
    voxels = image.float()
    head = (voxels.amax(1, keepdim=True) > 0).float()  # [B, 1, D, H, W]
    count = head.sum((2, 3, 4), keepdim=True).clamp(min=1)
    mean = (voxels * head).sum((2, 3, 4), keepdim=True) / count  # [B, C, 1, 1, 1]
    centred = (voxels - mean) * head
    deviation = ((centred * centred).sum((2, 3, 4), keepdim=True) / count).sqrt()
    return (centred / deviation.clamp(min=SMALLEST_DEVIATION)).to(image.dtype)
