"""From a network, or an engine, and an image to probabilities and labels; and the whole way from a case's files to a
label map on their grid."""

import time
from dataclasses import replace
from itertools import chain, combinations, pairwise
from pathlib import Path

import torch

from models.brats import Case, read_case, to_raw_labels, write_label_nifti
from models.device import synchronise
from models.losses import probabilities_from_logits
from models.preprocessing import native_label_map, to_network

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
        total = total + probabilities_from_logits(logits).flip(axes)
    return total[0] / len(mirrors)


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
