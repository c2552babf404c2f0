"""From a network, or an engine, and an image to probabilities and labels; and the one way from a raw case to a label
map on its grid, which evaluation, benchmark and viewer share."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain, combinations, product
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from models import refuse_unfit_size
from models.brats import REGION_CHANNELS, Case, read_case, to_raw_labels, write_label_nifti
from models.device import synchronise
from models.errors import InputError
from models.losses import probabilities_from_logits, region_probabilities
from models.preprocessing import label_map, native_label_map, to_network
from models.runs import Run

MIRRORS = tuple(chain.from_iterable(combinations((1, 2, 3), count) for count in range(4)))  # the 8 sets of axes
STAGES = ("load", "preprocess", "forward", "postprocess", "write")  # from the files of a case to a label map on disk
SIGMA = 1 / 8  # of the Gaussian that weights the voxels of a window, in sides of the window
LOWEST_WEIGHT = 1e-3  # or what only the corner of a window sees would be divided by almost nothing
# One window keeps a CPU busy. A GPU that can train a network has the memory for two.
WINDOWS_AT_ONCE = {"cpu": 1, "cuda": 2}


@dataclass(frozen=True)
class Member:
    """A network, or an engine, and how it is to see an image."""

    network: Callable[[Tensor], Tensor]
    amp_dtype: torch.dtype | None = None  # of autocast; an engine has a type of its own
    window: tuple[int, ...] | None = None  # [D, H, W] voxels: an image of another size is predicted in windows
    overlap: float = 0.5  # of a window with the next one, as a share of its side
    weights: str = "gaussian"  # of the voxels of a window in the mean over windows; or "constant"
    mirrored: tuple[int, ...] = ()  # axes of [4, D, H, W] that ran the other way where the network was trained


def member_of(run: Run, network: Callable[[Tensor], Tensor], amp_dtype: torch.dtype | None = None) -> Member:
    """The network of a run, or an engine made of it, used as the run's record says."""
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
    """The mean of what several networks predict, and how far they are apart. Memory does not grow with their number.

    Args:
        image: [4, D, H, W] on the device of the networks.
        flips: predict all eight mirror images of it (eight times the work).

    Returns:
        Probabilities float32: [4, D, H, W] of the classes, or [3, D, H, W] of the regions where a network has regions.
        The spread float32 [D, H, W]: the standard deviation of the whole tumour's probability over networks and mirror
        images, divided by their number; None where there is a single prediction.
    """
    count, totals = 0, {}  # channels of a network -> the sum of all such probabilities
    mean, squares = 0, 0  # of the whole tumour: Welford's running mean and sum of squared deviations
    for member in members:
        # One context for all passes: autocast then converts the weights once.
        with torch.autocast(image.device.type, member.amp_dtype, enabled=member.amp_dtype is not None):
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


# ---- windows -------------------------------------------------------------------------------------------------------


def _logits(member: Member, image: Tensor) -> Tensor:
    """Logits [4 or 3, D, H, W] of an image [4, D, H, W]: in one pass, or the mean over overlapping windows.

    Windows lie and are weighted as in MONAI's sliding_window_inference. An axis that is shorter than the window is
    padded with background on both sides. `accumulators_gib` says what this takes beside the image.
    """
    if member.window is None or tuple(image.shape[1:]) == tuple(member.window):
        return member.network(image[None])[0]
    sizes = image.shape[1:]
    missing = [max(0, side - size) for side, size in zip(member.window, sizes, strict=True)]
    if any(missing):
        image = pad(image, [part for n in reversed(missing) for part in (n // 2, n - n // 2)])
    corners = list(product(*map(window_starts, image.shape[1:], member.window, [member.overlap] * 3)))
    boxes = [(..., *(slice(low, low + side) for low, side in zip(corner, member.window, strict=True)))
             for corner in corners]  # fmt: skip
    # An engine is made for one shape.
    at_once = WINDOWS_AT_ONCE[image.device.type] if isinstance(member.network, nn.Module) else 1
    weight = window_weights(member.window, member.weights, image.device)  # [d, h, w]
    total, weights = None, image.new_zeros(image.shape[1:])
    for first in range(0, len(boxes), at_once):
        chosen = boxes[first : first + at_once]
        outputs = member.network(torch.stack([image[box] for box in chosen]))  # [B, 4 or 3, d, h, w]
        if total is None:
            total = image.new_zeros(outputs.shape[1], *image.shape[1:])
        for box, logits in zip(chosen, outputs, strict=True):
            total[box].addcmul_(logits.float(), weight)
            weights[box].add_(weight)
    total /= weights
    return total[(..., *(slice(n // 2, n // 2 + size) for n, size in zip(missing, sizes, strict=True)))]


def window_starts(size: int, side: int, overlap: float) -> list[int]:
    """Where the windows of this side begin along an axis of `size` voxels; the last one ends with it."""
    step = max(1, int(side * (1 - overlap)))
    return [*range(0, size - side, step), size - side]


def window_weights(window: tuple[int, ...], kind: str, device: torch.device) -> Tensor:
    """What each voxel of a window counts [d, h, w]: all the same ("constant"), or less towards its faces, where a
    network sees least of the surroundings ("gaussian")."""
    weights = torch.ones((), device=device)
    for side in window:
        offset = torch.arange(side, device=device) - (side - 1) / 2
        bell = torch.exp(-((offset / (SIGMA * side)) ** 2) / 2)
        weights = weights[..., None] * (bell if kind == "gaussian" else torch.ones_like(bell))
    return weights.clamp_(min=LOWEST_WEIGHT)


def accumulators_gib(sizes: tuple[int, ...], channels: int) -> float:
    """GiB that predicting a volume of these sizes in windows takes on the device: a float32 for every voxel of each
    output channel, and one for the sum of the weights."""
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
        on_stage: called as each stage begins: "preprocess", "forward", "postprocess". What it raises ends the work.
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
