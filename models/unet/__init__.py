"""The CNN baseline: MONAI's residual 3-D U-Net (after Kerfoot et al. 2019), 4.8 million parameters."""

import math

from monai.networks.nets import UNet

DEFAULTS = {
    "in_channels": 4,
    "out_channels": 4,
    "channels": (16, 32, 64, 128, 256),
    "strides": (2, 2, 2, 2),
    "num_res_units": 2,
}
SIZE_MULTIPLE = 16  # four halvings


def smallest_side(config: dict) -> tuple[int, str]:
    """Voxels that a side of a volume must have at least, and why."""
    return 2 * math.prod(config["strides"]), "instance norm needs more than one voxel at the coarsest level"


def build(**config):
    """The network with fresh weights; `config` is a complete set of the settings above."""
    return UNet(spatial_dims=3, **config)
