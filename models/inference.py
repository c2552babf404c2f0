"""From a network, or an engine of `models.engines`, and an image to probabilities and labels; and the whole way from
a case's files to a label map on their grid."""

import time
from dataclasses import replace
from itertools import chain, combinations, pairwise
from pathlib import Path

import numpy as np
import torch

from models.brats import Case, native_axes, read_case, to_raw_labels, write_label_nifti
from models.preprocessing import _from_ras, _resampling_steps, _sample, to_network
from models.speed import synchronise

MIRRORS = tuple(chain.from_iterable(combinations((2, 3, 4), count) for count in range(4)))  # the 8 sets of axes


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
        total = total + logits.float().softmax(1).flip(axes)
    return total[0] / len(mirrors)


def label_map(probabilities: torch.Tensor) -> torch.Tensor:
    """The most probable class uint8 [D, H, W] of [C, D, H, W], the lowest where two are equal.

    A running maximum takes a CPU a seventh of the time of argmax over the slowest axis.
    """
    best = probabilities[0].clone()
    label = torch.zeros_like(best, dtype=torch.uint8)
    for value, channel in enumerate(probabilities[1:], start=1):
        label.masked_fill_(channel > best, value)
        torch.maximum(best, channel, out=best)
    return label


def native_label_map(probabilities: torch.Tensor, geometry: dict) -> torch.Tensor:
    """`label_map(to_native(probabilities, geometry))`, uint8 [X, Y, Z], without the work where there is no tumour.

    Where background is most probable in all eight voxels around a point, it is so in every mixture of them. Only the
    points whose neighbours reach the box around the other voxels have to be computed.
    """
    axes = native_axes(geometry["affine"])
    result = probabilities.new_zeros([geometry["native_shape"][axis] for axis in axes], dtype=torch.uint8)
    occupied = label_map(probabilities) > 0
    steps, positions, inside = _resampling_steps(geometry), [], []
    for axis, (low, high) in enumerate(geometry["crop_box"]):
        side, others = occupied.shape[axis], [other for other in range(3) if other != axis]
        planes = occupied.any(others[1]).any(others[0]).nonzero().flatten().tolist()
        first, last = (planes[0], planes[-1]) if planes else (side, -1)
        in_crop = (np.arange(result.shape[axis]) + 0.5) / steps[axis] - 0.5 - low  # as in to_native
        position = (in_crop + 0.5) * (side / (high - low)) - 0.5
        kept = np.flatnonzero((position >= max(-0.5, first - 1)) & (position < min(side - 0.5, last + 1)))
        positions.append(position[kept])
        inside.append(slice(kept[0], kept[-1] + 1) if len(kept) else slice(0, 0))
    if all(map(len, positions)):
        result[tuple(inside)] = label_map(_sample(probabilities, positions, "linear"))
    return _from_ras(result[None], geometry["affine"])[0]


def segment_case(case: Case, network, size: int, device: torch.device, path: Path) -> dict[str, float]:
    """From a raw case's files to a label map on its grid with its data set's label values, written to `path` (.nii.gz).

    Returns the milliseconds of each stage: load, preprocess, forward, postprocess, write.
    """
    marks = [("start", time.perf_counter())]

    def done(stage: str):
        synchronise(device)
        marks.append((stage, time.perf_counter()))

    volumes = read_case(replace(case, files={role: files for role, files in case.files.items() if role != "seg"}))
    done("load")
    prepared = to_network(volumes.image, None, volumes.affine, size)
    image = prepared["image"].to(device)
    done("preprocess")
    probabilities = predict(network, image)  # [4, D, H, W]
    done("forward")
    label = native_label_map(probabilities, prepared["geometry"]).cpu().numpy()  # [X, Y, Z]
    done("postprocess")
    write_label_nifti(path, to_raw_labels(label, case.layout), volumes.affine)
    done("write")
    return {stage: 1e3 * (now - before) for (_, before), (stage, now) in pairwise(marks)}
