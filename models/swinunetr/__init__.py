"""Swin UNETR: a shifted-window transformer encoder with a U-Net decoder (Hatamizadeh et al. 2022, arXiv:2201.01266).

62.2 million parameters at the default feature size of 48, with the names and shapes of MONAI's SwinUNETR.
"""

from models.onednn import use_onednn
from models.swinunetr.network import SwinUNETR

DEFAULTS = {
    "in_channels": 4,
    "out_channels": 4,
    "feature_size": 48,  # channels of the finest level; a multiple of 12
    "window_size": 7,  # tokens along a side of an attention window
    "depths": (2, 2, 2, 2),  # Swin blocks per stage
    "num_heads": (3, 6, 12, 24),
    "attention": "auto",  # "reference" | "sdpa" | "auto"
    "checkpointing": "none",  # "none" | "blocks" | "full": what is recomputed in the backward pass to save memory
    "legacy_merging": False,  # the patch order of MONAI before 1.5, for weights that were trained with it
    "v2": False,  # a residual block of convolutions before each stage
    "drop_path": 0.0,  # how often the last block's branches are left out in training; the first block's never are
    "use_attention": True,  # False: the blocks are MLPs alone, to see what attention is worth
}
SIZE_MULTIPLE = 32  # five halvings


def smallest_side(config: dict) -> tuple[int, str]:
    """Voxels that a side of a volume must have at least, and why."""
    # No block would fill a larger window, or shift it.
    window = config["window_size"]
    return 2 * window, f"a window of {window} tokens of 2 voxels must fit in (--window-size)"


def build(**config):
    """The network with fresh weights; `config` is a complete set of the settings above."""
    return use_onednn(SwinUNETR(**config))
