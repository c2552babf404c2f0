"""Surfaces of masks and how far they are from each other, in millimetres.

The surface of a mask is its border voxels: those with one of their six neighbours outside the mask or outside the
array. BraTS 2026 and MONAI take these, each counting once; BraTS up to 2023 took the elements between the voxels,
weighted by their area.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import distance_transform_edt
from scipy.spatial import cKDTree

NEAR_VOXELS = 5
VOXELS_PER_SEARCH = 250  # what a distance transform takes in the time of one search from far


@dataclass(frozen=True)
class Surface:
    """The border voxels of one mask, and for each the nearest border voxel of the other mask."""

    voxels: np.ndarray  # int64 [n, 3]
    distance_mm: np.ndarray  # float64 [n]; infinite where the other mask is empty
    nearest: np.ndarray  # int64 [n], a row of the other surface's voxels


def surfaces(predicted: np.ndarray, true: np.ndarray, spacing_mm) -> tuple[Surface, Surface]:
    """The surfaces of two masks, bool [X, Y, Z] of one grid."""
    voxels = [border_voxels(mask) for mask in (predicted, true)]
    return tuple(Surface(own, *nearest_voxels(own, other, spacing_mm)) for own, other in (voxels, voxels[::-1]))


def border_voxels(mask: np.ndarray) -> np.ndarray:
    """Where the border of a mask, bool [X, Y, Z], is: int64 [n, 3], in the order of the array."""
    padded = np.pad(mask, 1)
    inside = mask.copy()
    for axis in range(mask.ndim):
        for start in (0, 2):
            window = [slice(1, -1)] * mask.ndim
            window[axis] = slice(start, start + mask.shape[axis])
            inside &= padded[tuple(window)]
    return np.argwhere(mask & ~inside)


def nearest_voxels(voxels: np.ndarray, others: np.ndarray, spacing_mm) -> tuple[np.ndarray, np.ndarray]:
    """From each of `voxels` [n, 3] to the nearest of `others` [m, 3]: distance in mm float64 [n], and its row [n]."""
    if not len(others):
        return np.full(len(voxels), np.inf), np.full(len(voxels), -1)
    tree = cKDTree(others * spacing_mm, balanced_tree=False, compact_nodes=False)
    row = tree.query(voxels * spacing_mm, distance_upper_bound=NEAR_VOXELS * max(spacing_mm))[1]
    far = np.flatnonzero(row == len(others))
    row[far] = _rows_from_far(voxels[far], others, spacing_mm, tree)
    # Again from whole steps: 3 * 0.9 - 2 * 0.9 is more than 0.9, and a tolerance of 0.9 mm would miss the next voxel.
    return np.sqrt((((voxels - others[row]) * spacing_mm) ** 2).sum(axis=1)), row


def _rows_from_far(voxels: np.ndarray, others: np.ndarray, spacing_mm, tree: cKDTree) -> np.ndarray:
    """The row of the nearest of `others` if none is near. A search of the tree then takes a hundred times as long, so
    for many voxels a distance transform of everything between them is faster."""
    if not len(voxels):
        return np.empty(0, int)
    low = np.minimum(voxels.min(axis=0), others.min(axis=0))
    shape = np.maximum(voxels.max(axis=0), others.max(axis=0)) - low + 1
    if len(voxels) * VOXELS_PER_SEARCH < np.prod(shape):
        return tree.query(voxels * spacing_mm)[1]
    rows = np.full(shape, -1, np.int32)
    rows[tuple((others - low).T)] = np.arange(len(others))
    nearest = distance_transform_edt(rows < 0, sampling=spacing_mm, return_distances=False, return_indices=True)
    return rows[tuple(nearest[:, *(voxels - low).T])]


def hd95(predicted_mm: np.ndarray, true_mm: np.ndarray) -> float:
    """The 95th percentile of the distances of both surfaces together, as BraTS 2026 has it."""
    return float(np.percentile(np.concatenate([predicted_mm, true_mm]), 95))


def larger_hd95(predicted_mm: np.ndarray, true_mm: np.ndarray) -> float:
    """The larger of the two surfaces' 95th percentiles, as BraTS up to 2023 and MONAI have it."""
    return float(max(np.percentile(predicted_mm, 95), np.percentile(true_mm, 95)))


def surface_dice(predicted_mm: np.ndarray, true_mm: np.ndarray, tolerance_mm: float) -> float:
    """Normalised surface Dice: the mean of the two shares of border voxels within the tolerance, as BraTS 2026 has it.
    (MONAI counts the voxels of both surfaces together: the larger surface weighs more.)"""
    return float(((predicted_mm <= tolerance_mm).mean() + (true_mm <= tolerance_mm).mean()) / 2)
