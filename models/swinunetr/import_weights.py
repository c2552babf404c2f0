"""Make a run of the Swin UNETR weights that were published for BraTS 2021 (Hatamizadeh et al. 2022, arXiv:2201.01266).

Download and unpack a fold, such as fold1_f48_ep300_4gpu_dice0_9059.zip, from
https://github.com/Project-MONAI/research-contributions/tree/main/SwinUNETR/BRATS21, then

  python -m models.swinunetr.import_weights fold1_f48_ep300_4gpu_dice0_9059/model.pt --run-name published-fold1
  python evaluate.py models/swinunetr/results/published-fold1 --cases data/BraTS2021_Training_Data

The run predicts as their test script does: whole files in their LPS axes, z-scores over the non-zero voxels of each
modality, windows of 128 voxels that all count the same, and a voxel belongs to a region if sigmoid(logit) > 0.5. Their
overlap is the 0.7 of the paper; the script's default is 0.6. Nothing is known of the split: four fifths of the labelled
BraTS 2021 cases were trained on by each fold.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models import build_model, cli
from models.brats import MODALITIES, REGION_CHANNELS
from models.errors import InputError, one_line
from models.files import git_commit, write_atomically
from models.runs import checkpoint_of, choose_folder, locked, save

PUBLISHED_MODALITIES = ("flair", "t1ce", "t1", "t2")  # the input channels of the folds; the outputs are TC, WT, ET
RECIPE = {
    "size": [128, 128, 128],
    "preprocessing": {"size": None, "spacing_mm": 1.0, "normalize": "zscore", "crop": False},
    "inference": {"overlap": 0.7, "weights": "constant", "axes": "LPS"},
}
IMAGE_LAYERS = (  # every weight [O, 4, ...] that meets the image itself
    "swinViT.patch_embed.proj.weight",
    "encoder1.layer.conv1.conv.weight",
    "encoder1.layer.conv3.conv.weight",
)
# The folds' best score is a numpy scalar, which torch.load has to be allowed to read, under the name of numpy 1 or 2.
NUMPY_SCALAR = np.float64().__reduce__()[0]
NUMPY_GLOBALS = [
    *((NUMPY_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float32, np.float64)),
]


def import_state_dict(checkpoint: dict) -> dict[str, Tensor]:
    """Published weights (a state dict, or a dict that holds one as "state_dict") with the input channels in our order.

    Anything that is not such weights is an InputError.
    """
    weights = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else {}
    weights = {str(name).removeprefix("module."): weight for name, weight in weights.items()}
    order = [PUBLISHED_MODALITIES.index(modality) for modality in MODALITIES]
    for name in IMAGE_LAYERS:
        weight = weights.get(name)
        if not isinstance(weight, Tensor) or weight.dim() != 5 or weight.shape[1] != len(MODALITIES):
            raise InputError(f"not the weights of a four-channel MONAI SwinUNETR: {name} is missing or of wrong shape.")
        weights[name] = weight[:, order]  # [O, 4, k, k, k]
    return weights


def load_published(path: str | Path) -> tuple[nn.Module, dict]:
    """The network of a published checkpoint file in evaluation mode, its input channels in our order; the checkpoint.

    Feature size, window size, depths, heads, output channels and V2 are read off the weights. Patches are merged in the
    order of MONAI before 1.5, with which they were trained. InputError for any other file.
    """
    try:
        with torch.serialization.safe_globals(NUMPY_GLOBALS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.") from None
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError and more for a bad file
        raise InputError(f"{path}: damaged, or not a file of weights ({one_line(error, 80)}).") from None
    try:
        weights = import_state_dict(checkpoint)
        model = build_model("swinunetr", **settings_of(weights), legacy_merging=True)
        model.load_state_dict(weights, strict=True)
    except (InputError, KeyError, RuntimeError) as error:
        raise InputError(f"{path}: {one_line(error, 200)}") from None
    return model.eval(), checkpoint


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


def import_run(path: Path, name: str) -> Path:
    """Write a published fold as a run of this name: best.pt, and config.json with the recipe that it wants.

    Returns the folder. InputError where there is a run already, and for a file that is no such fold.
    """
    folder = choose_folder("swinunetr", name)
    if any((folder / checkpoint).exists() for checkpoint in ("best.pt", "last.pt")):
        raise InputError(f"{folder} already holds a run. Choose another --run-name.")
    model, checkpoint = load_published(path)
    outputs = model.config["out_channels"]
    if outputs != len(REGION_CHANNELS):
        raise InputError(f"{path}: has {outputs} outputs, but the published folds have {len(REGION_CHANNELS)}, the "
                         f"regions {', '.join(REGION_CHANNELS)}.")  # fmt: skip
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    source = {"file": path.name, "folder": path.resolve().parent.name, "sha256": sha256}
    record = {"network": model.network, "model": model.config, **RECIPE, "imported_from": source,
              "git_commit": git_commit(), "torch": torch.__version__}  # fmt: skip
    with locked(folder):
        write_atomically(folder / "config.json", json.dumps(record, indent=1))
        epochs = int(checkpoint.get("epoch", -1)) + 1  # theirs count from 0
        # The checkpoint comes last: with it the run is whole.
        save(folder / "best.pt", checkpoint_of(model, "off", epochs, None))
    return folder


def main() -> int:
    parser = cli.parser(__doc__)
    parser.prog = "python -m models.swinunetr.import_weights"
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="model.pt of an unpacked fold")
    parser.add_argument("--run-name", type=cli.folder_name, required=True,
                        help="folder below models/swinunetr/results/ to write to")
    args = parser.parse_args()
    folder = import_run(args.checkpoint, args.run_name)
    print(f"Wrote {folder}. It is scored on raw cases: python evaluate.py {folder} --cases FOLDER")
    return 0


if __name__ == "__main__":
    cli.run(main)
