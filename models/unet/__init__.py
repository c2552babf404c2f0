"""The CNNs: the baseline, MONAI's residual 3-D U-Net (after Kerfoot et al. 2019), and U-Nets of our own with a level at
full resolution. What they cost, as GMAC for a volume of 64x64x64 voxels:

    variant           channels           million parameters   GMAC
    monai             16 32 64 128 256                  4.8    1.7
    full-resolution   16 32 64 128 256                  5.6   11.7
    full-resolution    8 32 64 128 256                  5.6    8.4
    full-resolution    8 24 48 96 192                   3.2    5.3
    full-resolution    8 16 32 64 128                   1.4    3.0
    space-to-depth     8 32 64 128 256, residual        5.7    8.8
    space-to-depth     8 24 48 96 192, residual         3.2    5.5
"""

import json
import math

from monai.networks.nets import UNet as MonaiUNet

from models.errors import InputError
from models.onednn import use_onednn
from models.unet.network import UNet

DEFAULTS = {
    "in_channels": 4,
    "out_channels": 4,
    "variant": "monai",  # "monai" | "full-resolution" | "space-to-depth", of network.py the last two
    "channels": (16, 32, 64, 128, 256),  # of each level; MONAI's first one has half the resolution
    "strides": (2, 2, 2, 2),
    "num_res_units": 2,
    "convolutions": (1, 2, 2, 2, 2),  # 3x3x3 in a block of each level
    "residual": False,
    "upsampling": "transposed",  # "transposed" | "trilinear"
}
OF_MONAI, OF_OURS = ("strides", "num_res_units"), ("convolutions", "residual", "upsampling")
SIZE_MULTIPLE = 16  # four halvings


def smallest_side(config: dict) -> tuple[int, str]:
    """Voxels that a side of a volume must have at least, and why."""
    factor = math.prod(config["strides"]) if config["variant"] == "monai" else 2 ** (len(config["channels"]) - 1)
    return 2 * factor, "instance norm needs more than one voxel at the coarsest level"


def build(**config):
    """The network with fresh weights; `config` is a complete set of the settings above."""
    is_monais = config["variant"] == "monai"
    unused = OF_OURS if is_monais else OF_MONAI
    for setting in unused:
        if json.dumps(config[setting]) != json.dumps(DEFAULTS[setting]):  # of a checkpoint: lists, not tuples
            raise InputError(f"{setting} {config[setting]}: the variant {config['variant']!r} of the U-Net has no such "
                             "setting.")  # fmt: skip
    if is_monais and len(config["channels"]) != len(config["strides"]) + 1:
        raise InputError(f"channels {tuple(config['channels'])}: this U-Net has {len(config['strides']) + 1} levels.")
    used = {setting: value for setting, value in config.items() if setting not in unused}
    if not is_monais:
        return use_onednn(UNet(**used))
    del used["variant"]
    return use_onednn(MonaiUNet(spatial_dims=3, **used))
