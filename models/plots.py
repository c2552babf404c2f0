"""Every saved figure, and the few drawing rules that they and the viewer share. Knows arrays, not files.

Volumes come in RAS axes ([..., D, H, W]: index grows to the patient's right, to anterior, to superior) and are shown
in radiological convention: the patient's right is on the left of the picture, anterior (or superior) is up.
"""

import numpy as np

# Label colours are told apart by people who see red and green alike (Okabe & Ito): vermilion, sky blue, yellow.
LABEL_COLORS = {1: (0.84, 0.37, 0.00), 2: (0.34, 0.71, 0.91), 3: (0.94, 0.89, 0.26)}
PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}  # the array axis that a plane's slices run along
CONVENTION = "radiological convention: the patient's right is on the left"


def slice_view(volume: np.ndarray, plane: str, index: int) -> np.ndarray:
    """Slice `index` of a RAS volume [..., D, H, W] as a picture [..., rows, columns], row 0 at the top."""
    picture = np.take(volume, index, axis=PLANES[plane] - 3)
    picture = np.swapaxes(picture, -1, -2)[..., ::-1, :]  # up is anterior (axial) or superior
    # Axial and coronal columns then run to the patient's right: mirrored. Sagittal columns run to anterior.
    return picture if plane == "sagittal" else picture[..., ::-1]


def intensity_window(volume: np.ndarray, low: float = 1.0, high: float = 99.5) -> tuple[float, float]:
    """The percentiles of the non-zero voxels between which a modality is shown; (0, 1) for an empty volume."""
    foreground = volume[volume != 0]
    if foreground.size == 0:
        return 0.0, 1.0
    bottom, top = np.percentile(foreground[:: max(1, foreground.size // 200_000)], (low, high))
    return float(min(bottom, 0.0) if bottom > 0 else bottom), float(max(top, bottom + 1e-6))


def label_overlay(label: np.ndarray, opacity: float) -> np.ndarray:
    """A label picture [rows, columns] of training labels as RGBA [rows, columns, 4] to lay over a slice."""
    table = np.zeros((len(LABEL_COLORS) + 1, 4), np.float32)
    for value, color in LABEL_COLORS.items():
        table[value] = (*color, opacity)
    return table[label]


def largest_tumour_slice(label: np.ndarray, plane: str = "axial") -> int:
    """Index of the slice with most tumour voxels along a plane; the middle slice when there is no tumour."""
    axis = PLANES[plane]
    areas = np.count_nonzero(label, axis=tuple(other for other in range(3) if other != axis))
    return int(areas.argmax()) if areas.any() else label.shape[axis] // 2
