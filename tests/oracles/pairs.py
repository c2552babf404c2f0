"""Pairs of a prediction and its truth on which official programs and our scores are compared.

The tests import this, and so do the oracles, which run in environments of their own: numpy, scipy and nibabel suffice.
A pair is (name, prediction, truth, spacing_mm), the label maps uint8 [X, Y, Z] with training labels.
"""

from pathlib import Path

import nibabel
import numpy as np
from scipy import ndimage

NCR, ED, ET = 1, 2, 3
ONE_MM = (1.0, 1.0, 1.0)
UNEQUAL_MM = (0.8, 1.5, 1.0)


def real_pairs(folder: Path):
    """One pair from each of twelve BraTS 2018 cases; those that are not in the folder are left out."""
    for case, (make, spacing_mm) in REAL.items():
        path = folder / case / f"{case}_seg.nii.gz"
        if path.exists():
            truth = np.asarray(nibabel.load(path).dataobj).astype(np.uint8)
            truth[truth == 4] = ET
            yield f"{case} {make.__name__}", *make(truth), spacing_mm


def synthetic_pairs():
    """Small pairs, with what the real ones have not: masks at the border of the array, masks that only touch."""
    yield "balls", *balls(1), ONE_MM
    yield "balls, unequal sides", *balls(2), UNEQUAL_MM
    yield "balls, large voxels", *balls(3), (2.0, 2.0, 3.0)
    truth, prediction = np.zeros((2, 30, 20, 20), np.uint8)
    yield "nothing", prediction.copy(), truth.copy(), ONE_MM
    truth[2:8, 4:12, 4:12] = ET
    yield "nothing predicted", prediction.copy(), truth.copy(), ONE_MM
    yield "nothing true", truth.copy(), prediction.copy(), UNEQUAL_MM
    prediction[8:14, 4:12, 4:12] = ET
    yield "neighbours that share no voxel", prediction.copy(), truth.copy(), ONE_MM
    prediction[3:14, 5:12, 4:12] = ET
    truth[10:16, 4:12, 4:12] = ET
    yield "one part for two lesions", prediction.copy(), truth.copy(), ONE_MM
    yield "two parts for one lesion", truth.copy(), prediction.copy(), UNEQUAL_MM


def balls(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Twelve lesions of three layers [40, 44, 36], and a prediction that moves, misses and invents some."""
    random = np.random.RandomState(seed)  # its numbers are the same in every version of NumPy
    prediction, truth = np.zeros((2, 40, 44, 36), np.uint8)
    for number in range(12):
        center, radius = random.randint(0, truth.shape), random.randint(2, 8)
        if number % 4 != 1:
            draw_ball(truth, center, radius)
        if number % 4 != 2:
            draw_ball(prediction, center + random.randint(-2, 3, 3), radius + random.randint(-1, 2))
    return prediction, truth


def draw_ball(label: np.ndarray, center, radius: int):
    grid = np.indices(label.shape)
    distance2 = sum((line - middle) ** 2 for line, middle in zip(grid, center, strict=True))
    for layer, value in enumerate((ED, ET, NCR)):
        label[distance2 < max(0, radius - 2 * layer) ** 2] = value


# ---- what a prediction does wrong: truth -> (prediction, truth) ----------------------------------------------------


def shifted(truth):
    return np.roll(truth, (2, -1, 1), (0, 1, 2)), truth


def eroded(truth):
    return truth * ndimage.binary_erosion(truth > 0), truth


def dilated(truth):
    prediction = truth.copy()
    prediction[ndimage.binary_dilation(truth > 0, iterations=2) & (truth == 0)] = ED
    return prediction, truth


def missed(truth):
    prediction = np.roll(truth, 1, 0)
    draw_ball(truth, (30, 40, 50), 7)
    return prediction, truth


def invented(truth):
    prediction = np.roll(truth, 1, 1)
    draw_ball(prediction, (200, 190, 30), 6)
    return prediction, truth


def missed_and_invented(truth):
    prediction, _ = invented(truth)
    return prediction, missed(truth)[1]


def split(truth):
    """A gap across the middle of the tumour: two parts for one lesion."""
    prediction = truth.copy()
    middle = int(ndimage.center_of_mass(truth > 0)[0])
    prediction[middle - 1 : middle + 2] = 0
    return prediction, truth


def fragmented(truth):
    """Holes, wrong labels and crumbs: hundreds of parts."""
    random = np.random.RandomState(0)
    blocks = random.random_sample([-(-side // 4) for side in truth.shape])
    for axis, side in enumerate(truth.shape):
        blocks = np.repeat(blocks, 4, axis).take(range(side), axis)
    prediction = truth.copy()
    prediction[(blocks < 0.3) & (truth == ET)] = NCR
    prediction[blocks < 0.15] = 0
    prediction[(blocks > 0.9) & (truth == 0) & ndimage.binary_dilation(truth > 0, iterations=8)] = ED
    return prediction, truth


def without_et(truth):
    truth[truth == ET] = NCR
    return np.roll(truth, 1, 2), truth


def et_missed(truth):
    prediction = np.roll(truth, 1, 2)
    prediction[prediction == ET] = ED
    return prediction, truth


def nothing_predicted(truth):
    return np.zeros_like(truth), truth


REAL = {
    "Brats18_TCIA01_201_1": (shifted, ONE_MM),
    "Brats18_TCIA01_378_1": (eroded, ONE_MM),
    "Brats18_TCIA01_425_1": (dilated, ONE_MM),
    "Brats18_TCIA01_499_1": (missed, ONE_MM),
    "Brats18_TCIA02_135_1": (invented, ONE_MM),
    "Brats18_TCIA02_370_1": (missed_and_invented, ONE_MM),
    "Brats18_TCIA02_606_1": (split, ONE_MM),
    "Brats18_TCIA03_265_1": (fragmented, ONE_MM),
    "Brats18_TCIA10_628_1": (without_et, ONE_MM),
    "Brats18_TCIA10_637_1": (et_missed, ONE_MM),
    "Brats18_TCIA10_639_1": (nothing_predicted, ONE_MM),
    "Brats18_TCIA13_623_1": (shifted, UNEQUAL_MM),
}
