"""Label maps: raw values to training labels and back."""

import numpy as np

from models.brats import LABEL_SCHEMES, LABELS, SCHEME_USERS, list_schemes
from models.errors import InputError


def to_training_labels(label: np.ndarray, scheme: str, path="the segmentation", flag: str = "--labels") -> np.ndarray:
    """Raw label values [...] of one scheme -> training labels uint8 [...]; an unknown value is refused, and `flag` is
    what names another scheme. None is advised because its values fit: that does not make it the right one."""
    mapping = LABEL_SCHEMES[scheme]
    tumour = tuple(slice(low, high) for low, high in occupied_box(label))  # a fortieth of a head, all else is 0
    inside = label[tumour]
    values = np.unique(inside) if inside.size and inside.min() < 0 else np.flatnonzero(np.bincount(inside.ravel()))
    unknown = [int(value) for value in values if value not in mapping]
    if unknown:
        raise InputError(f"{path}: label value {unknown[0]} is not one of {sorted(mapping)} ({scheme}: "
                         f"{SCHEME_USERS[scheme]}). If it comes from elsewhere, say what its values mean with {flag}: "
                         f"{list_schemes()}.")  # fmt: skip
    table = np.zeros(max(mapping) + 1, np.uint8)
    for raw, training in mapping.items():
        table[raw] = training
    result = np.zeros_like(label, np.uint8)
    result[tumour] = table[inside]
    return result


def to_raw_labels(label: np.ndarray, scheme: str) -> np.ndarray:
    """Training labels [...] -> the raw values of the data set, uint8 [...]; of two raw values, the first."""
    table = np.zeros(len(LABELS) + 1, np.uint8)
    for raw, training in reversed(LABEL_SCHEMES[scheme].items()):
        if training:
            table[training] = raw
    return table[label]


def occupied_box(volume: np.ndarray) -> list[tuple[int, int]]:
    """[low, high) along every axis of the voxels of [...] that are not zero; (0, 0) where all are."""
    # Bits or-ed along the other axes: no mask of the whole grid is made, and negative voxels count.
    bits = volume if volume.dtype.kind in "iu" else volume != 0
    box = []
    for axis in range(volume.ndim):
        line = np.bitwise_or.reduce(bits, axis=tuple(other for other in range(volume.ndim) if other != axis))
        occupied = np.flatnonzero(line)
        box.append((int(occupied[0]), int(occupied[-1]) + 1) if occupied.size else (0, 0))
    return box
