"""From a network, or an engine, and an image to probabilities and labels; and the one way from a raw case to a label
map on its grid, which evaluation, benchmark and viewer share."""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import torch

from models.brats import Case, read_case, to_raw_labels, write_label_nifti
from models.device import synchronise
from models.errors import InputError
from models.losses import probabilities_from_logits
from models.preprocessing import label_map, native_label_map, to_network
from models.runs import Run

MIRRORS = tuple(chain.from_iterable(combinations((2, 3, 4), count) for count in range(4)))  # the 8 sets of axes
STAGES = ("load", "preprocess", "forward", "postprocess", "write")  # from the files of a case to a label map on disk


@torch.inference_mode()
def predict(model, image: torch.Tensor, amp_dtype: torch.dtype | None = None, flips: bool = False) -> torch.Tensor:
    """Class probabilities float32 [4, D, H, W] of one image [4, D, H, W] on the model's device, in one pass over the
    whole volume; with `flips`, the mean over all eight mirror images (eight times the work)."""
    image = image[None]  # [1, 4, D, H, W]
    total = 0
    mirrors = MIRRORS if flips else MIRRORS[:1]
    for axes in mirrors:
        with torch.autocast(image.device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = model(image.flip(axes))
        total = total + probabilities_from_logits(logits).flip(axes)
    return total[0] / len(mirrors)


# ---- a raw case ----------------------------------------------------------------------------------------------------


def segment(
    image: np.ndarray,
    affine: np.ndarray | None,
    network,
    *,
    size: int,
    spacing_mm: float,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> np.ndarray:
    """Training labels uint8 [X, Y, Z] of an image, on its own grid.

    Args:
        image: raw intensities [4, X, Y, Z] with their `affine`; or, where that is None, an image [4, D, H, W] that is
            in network space already.
        size, spacing_mm: side of the cube in voxels and spacing before the crop, as in the training of the network.
        amp_dtype: of autocast; an engine has a type of its own.
        on_stage: called as each stage begins: "preprocess", "forward", "postprocess". What it raises ends the work.
    """
    on_stage("preprocess")
    case = {"image": torch.from_numpy(image)} if affine is None else to_network(image, None, affine, size, spacing_mm)
    prepared = case["image"].to(device)  # [4, D, H, W]
    synchronise(device)
    on_stage("forward")
    probabilities = predict(network, prepared, amp_dtype)  # [4, D, H, W]
    synchronise(device)
    on_stage("postprocess")
    label = label_map(probabilities) if affine is None else native_label_map(probabilities, case["geometry"])
    return label.cpu().numpy()


def segment_case(
    case: Case,
    network,
    path: Path,
    *,
    size: int,
    spacing_mm: float,
    scheme: str,
    device: torch.device,
    on_stage: Callable[[str], None] = lambda stage: None,
):
    """From the files of a raw case to a label map on its grid with the label values of `scheme` (of LABEL_SCHEMES),
    written to `path` (.nii.gz). `on_stage` is called as each of STAGES begins; the rest is as in `segment`."""
    on_stage("load")
    volumes = read_case(replace(case, files={role: files for role, files in case.files.items() if role != "seg"}))
    settings = {"size": size, "spacing_mm": spacing_mm, "device": device, "on_stage": on_stage}
    label = segment(volumes.image, volumes.affine, network, **settings)
    on_stage("write")
    write_prediction(path, label, scheme, volumes.affine)


def write_prediction(path: Path, label: np.ndarray, scheme: str, affine: np.ndarray):
    """Training labels [X, Y, Z] as a `.nii.gz` with the label values of `scheme`."""
    write_label_nifti(path, to_raw_labels(label, scheme), affine)


def refuse_unknown_preprocessing(run: Run):
    """InputError unless the record of a run says how raw cases become what its network was trained on."""
    if run.preprocessing is None or run.size is None:
        path = run.folder / "config.json"
        raise InputError(f"{path}: does not say how the cases that the run was trained on were preprocessed.")
