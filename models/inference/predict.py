"""From a network, or an engine, and an image to probabilities and labels; and from a raw case to a label map on its
grid, for evaluation, benchmark and viewer alike."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain, combinations
from math import prod
from pathlib import Path

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from torch import Tensor, nn

from models import refuse_unfit_size
from models.brats import REGION_CHANNELS
from models.cases import Case
from models.device import synchronise
from models.errors import InputError
from models.labels import to_raw_labels
from models.losses import probabilities_from_logits, region_probabilities
from models.nifti import write_label_nifti
from models.preprocessing import label_map, native_label_map, to_network
from models.runs import Run
from models.volumes import read_case

MIRRORS = tuple(chain.from_iterable(combinations((1, 2, 3), count) for count in range(4)))  # the 8 sets of axes
STAGES = ("load", "preprocess", "forward", "postprocess", "write")  # from the files of a case to a label map on disk
# One window keeps a CPU busy. A GPU that can train a network has the memory for two.
WINDOWS_AT_ONCE = {"cpu": 1, "cuda": 2}


@dataclass(frozen=True)
class Member:
    """A network, or an engine, and how images are passed to it."""

    network: Callable[[Tensor], Tensor]
    amp_dtype: torch.dtype | None = None  # of autocast; an engine has a type of its own
    window: tuple[int, ...] | None = None  # [D, H, W] voxels: an image of another size is predicted in windows
    overlap: float = 0.5  # of a window with the next one, as a share of its side
    weights: str = "gaussian"  # of a window's voxels in the mean over windows: less towards its faces; or "constant"
    mirrored: tuple[int, ...] = ()  # axes of [4, D, H, W] that ran in the other direction in training


def member_of(run: Run, network: Callable[[Tensor], Tensor], amp_dtype: torch.dtype | None = None) -> Member:
    """The network of a run, or an engine made from it, used as the run's record says."""
    recipe = dict(run.inference)
    axes = recipe.pop("axes", "RAS")
    mirrored = tuple(place for place, (own, ras) in enumerate(zip(axes, "RAS", strict=True), start=1) if own != ras)
    return Member(network, amp_dtype, run.size and tuple(run.size), mirrored=mirrored, **recipe)


def predict(
    network: Callable[[Tensor], Tensor],
    image: Tensor,
    amp_dtype: torch.dtype | None = None,
    flips: bool = False,
    window: tuple[int, ...] | None = None,
    overlap: float = 0.5,
) -> Tensor:
    """Probabilities float32 of one image [4, D, H, W] on the network's device: [4, D, H, W] of the classes or
    [3, D, H, W] of the regions, whichever the network was trained for. `flips` is that of `predict_all`, `window` and
    `overlap` are those of a Member."""
    return predict_all([Member(network, amp_dtype, window, overlap)], image, flips)[0]


@torch.inference_mode()
def predict_all(members: list[Member], image: Tensor, flips: bool = False) -> tuple[Tensor, Tensor | None]:
    """The mean prediction of several networks, and its spread. Memory does not grow with their number.

    Args:
        image: [4, D, H, W] on the device of the networks.
        flips: predict all eight mirror images of it (eight times the work).

    Returns:
        Probabilities float32: [4, D, H, W] of the classes, or [3, D, H, W] of the regions where a network has regions.
        The spread float32 [D, H, W]: the standard deviation, of the population, of the whole tumour's probability over
        networks and mirror images; None where there is a single prediction.
    """
    count, totals = 0, {}  # channels of a network -> the sum of all such probabilities
    mean, squares = 0, 0  # of the whole tumour: Welford's running mean and sum of squared deviations
    for member in members:
        for axes in MIRRORS if flips else (member.mirrored,):
            logits = _logits(member, image.flip(axes)).flip(axes)  # [4 or 3, D, H, W]
            probabilities = probabilities_from_logits(logits[None])[0]
            channels, count = len(probabilities), count + 1
            totals[channels] = totals.get(channels, 0) + probabilities
            if len(members) > 1 or flips:
                whole_tumour = region_probabilities(probabilities)[REGION_CHANNELS.index("WT")]
                deviation = whole_tumour - mean
                mean = mean + deviation / count
                squares = squares + deviation * (whole_tumour - mean)
    sums = list(totals.values())
    if len(sums) > 1:  # classes and regions: the regions of a sum are the sum of the regions
        sums = [sum(map(region_probabilities, sums))]
    return sums[0] / count, (squares / count).sqrt() if count > 1 else None


def _logits(member: Member, image: Tensor) -> Tensor:
    """Logits [4 or 3, D, H, W] of an image [4, D, H, W]: in one pass, or the mean over overlapping windows. An axis
    that is shorter than the window is padded with background on both sides."""

    def network(images):
        with torch.autocast(image.device.type, member.amp_dtype, enabled=member.amp_dtype is not None):
            return member.network(images).float()  # windows are summed in float32

    if member.window is None or tuple(image.shape[1:]) == tuple(member.window):
        return network(image[None])[0]
    # An engine is made for one shape.
    at_once = WINDOWS_AT_ONCE[image.device.type] if isinstance(member.network, nn.Module) else 1
    return sliding_window_inference(
        image[None], member.window, at_once, network, overlap=member.overlap, mode=member.weights
    )[0]


def accumulators_gib(sizes: tuple[int, ...], channels: int) -> float:
    """GiB that predicting a volume of these sizes in windows takes on the device beside the windows themselves: a
    float32 for every voxel of each output channel, and one for the sum of the weights."""
    return (channels + 1) * prod(sizes) * 4 / 2**30


# ---- a raw case ----------------------------------------------------------------------------------------------------


def segment(
    image: np.ndarray,
    affine: np.ndarray | None,
    member: Member,
    preprocessing: dict,
    device: torch.device,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> np.ndarray:
    """Training labels uint8 [X, Y, Z] of an image, on its own grid.

    Args:
        image: raw intensities [4, X, Y, Z] with their `affine`; or, where that is None, an image [4, D, H, W] that is
            in network space already.
        preprocessing: arguments of `to_network`, as in the training of the network (see runs.Run).
        device: of the network.
        on_stage: called as each stage begins: "preprocess", "forward", "postprocess". An exception that it raises ends
            the work.
    """
    on_stage("preprocess")
    case = {"image": torch.from_numpy(image)} if affine is None else to_network(image, None, affine, **preprocessing)
    prepared = case["image"].to(device)  # [4, D, H, W]
    synchronise(device)
    on_stage("forward")
    probabilities, _ = predict_all([member], prepared)
    synchronise(device)
    on_stage("postprocess")
    label = label_map(probabilities) if affine is None else native_label_map(probabilities, case["geometry"])
    return label.cpu().numpy()


def segment_case(
    case: Case,
    member: Member,
    path: Path,
    *,
    preprocessing: dict,
    scheme: str,
    device: torch.device,
    on_stage: Callable[[str], None] = lambda stage: None,
):
    """From the files of a raw case to a label map on its grid with the label values of `scheme` (of LABEL_SCHEMES),
    written to `path` (.nii.gz). `on_stage` is called as each of STAGES begins; the rest is as in `segment`."""
    on_stage("load")
    volumes = read_case(replace(case, files={role: files for role, files in case.files.items() if role != "seg"}))
    label = segment(volumes.image, volumes.affine, member, preprocessing, device, on_stage)
    on_stage("write")
    write_prediction(path, label, scheme, volumes.affine)


def write_prediction(path: Path, label: np.ndarray, scheme: str, affine: np.ndarray):
    """Training labels [X, Y, Z] as a `.nii.gz` with the label values of `scheme`."""
    write_label_nifti(path, to_raw_labels(label, scheme), affine)


def refuse_unknown_preprocessing(run: Run):
    """InputError unless the record of a run says how raw cases become what its network was trained on, and in what
    size the network, which must fit it, sees them."""
    path = run.folder / "config.json"
    if run.preprocessing is None or run.size is None:
        raise InputError(f"{path}: does not say how the cases that the run was trained on were preprocessed.")
    refuse_unfit_size(run.network, run.config, run.size, path)
