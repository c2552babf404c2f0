"""Weights of MONAI's SwinUNETR for our network, such as those published with the paper for BraTS 2021.

The published folds (Hatamizadeh et al. 2022, arXiv:2201.01266; feature size 48) differ from our checkpoints in three
ways: their input channels are FLAIR, T1CE, T1, T2; their three output channels are the logits of overlapping regions
(tumour core, whole tumour, enhancing tumour, each with a sigmoid) instead of exclusive labels; and they were trained
when MONAI merged patches in another order. The first is mended here, the third by `legacy_merging=True`, and whoever
uses the outputs has to know of the second.
"""

from pathlib import Path

import torch
from torch import Tensor

from models.brats import MODALITIES
from models.errors import InputError, one_line
from models.swinunetr.network import SwinUNETR

PUBLISHED_MODALITIES = ("flair", "t1ce", "t1", "t2")  # the input channels of the BraTS 2021 folds
PUBLISHED_REGIONS = ("TC", "WT", "ET")  # their output channels: a voxel belongs to a region if sigmoid(logit) > 0.5
IMAGE_LAYERS = (  # every weight [O, 4, ...] that meets the image itself
    "swinViT.patch_embed.proj.weight",
    "encoder1.layer.conv1.conv.weight",
    "encoder1.layer.conv3.conv.weight",
)


def import_state_dict(checkpoint: dict, modalities=PUBLISHED_MODALITIES) -> dict[str, Tensor]:
    """MONAI weights (a state dict, or a dict that holds one as "state_dict") with the input channels in our order.

    `modalities` is the order that they were trained with. Anything that is not such weights is an InputError.
    """
    if sorted(modalities) != sorted(MODALITIES):
        raise InputError(f"modalities {tuple(modalities)}: expected {', '.join(MODALITIES)} in some order.")
    weights = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else {}
    weights = {name.removeprefix("module."): weight for name, weight in weights.items()}
    order = [modalities.index(modality) for modality in MODALITIES]
    for name in IMAGE_LAYERS:
        weight = weights.get(name)
        if not isinstance(weight, Tensor) or weight.dim() != 5 or weight.shape[1] != len(MODALITIES):
            raise InputError(f"not the weights of a four-channel MONAI SwinUNETR: {name} is missing or of wrong shape.")
        weights[name] = weight[:, order]  # [O, 4, k, k, k]
    return weights


def load_monai_weights(path: str | Path, modalities=PUBLISHED_MODALITIES, legacy_merging: bool = True) -> SwinUNETR:
    """The network of a MONAI checkpoint file in evaluation mode, its input channels in our order.

    Feature size, window size, depths, heads, output channels and V2 are read off the weights. Say
    `legacy_merging=False` for weights that were trained with MONAI 1.5 or later.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.") from None
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError and more for a bad file
        raise InputError(f"{path}: damaged or no weights ({one_line(error, 80)}).") from None
    try:
        weights = import_state_dict(checkpoint, modalities)
        model = SwinUNETR(**settings_of(weights), legacy_merging=legacy_merging)
        model.load_state_dict(weights, strict=True)
    except (InputError, KeyError, RuntimeError) as error:
        raise InputError(f"{path}: {one_line(error, 200)}") from None
    return model.eval()


def settings_of(weights: dict[str, Tensor]) -> dict:
    """The settings of the network that a MONAI state dict belongs to."""
    depths, num_heads = [], []
    for stage in range(1, 5):
        blocks = f"swinViT.layers{stage}.0.blocks."
        depths.append(len({name.removeprefix(blocks).split(".")[0] for name in weights if name.startswith(blocks)}))
        num_heads.append(weights[f"{blocks}0.attn.relative_position_bias_table"].shape[1])
    tokens = weights["swinViT.layers1.0.blocks.0.attn.relative_position_index"].shape[0]
    return {
        "in_channels": weights[IMAGE_LAYERS[0]].shape[1],
        "out_channels": weights["out.conv.conv.weight"].shape[0],
        "feature_size": weights[IMAGE_LAYERS[0]].shape[0],
        "window_size": round(tokens ** (1 / 3)),
        "depths": tuple(depths),
        "num_heads": tuple(num_heads),
        "v2": any(name.startswith("swinViT.layers1c.") for name in weights),
    }
