"""Lesion-wise scores by the standards of BraTS 2026 and of BraTS 2023. A part is a 26-connected part of a mask.

BraTS 2026 (`brats-evaluation` 0.0.10, configuration `gli`, on `panoptica` 2.1.7): every part is a lesion, whatever its
size. True and predicted lesions are matched one to one, so that the sum of their Dice is the largest. Dice, NSD and
HD95 are means over the matched pairs alone: what was missed or invented shows in the counts and not in the means. The
tolerance of the NSD is the smallest side of a voxel. Deviations:
* Where nothing matches, HD95 is 374 mm and not infinite; where both masks are empty, the scores are 1, 1 and 0 mm and
  not undefined.
* Of several matchings with the same sum of Dice, another may be taken.
* Of a NIfTI file with unequal sides of its voxels, the package takes them in the reverse order; ours are in order.

BraTS 2023 (rachitsaluja/BraTS-2023-Metrics, `BraTS-GLI`): true parts whose surroundings of 3 voxels meet are one
lesion. All predicted parts that reach into these surroundings are its prediction; one part may serve several lesions.
Lesions of at most 50 mm3 do not count, nor does what was predicted there. Dice and HD95 are means over the true lesions
and the invented parts, of any size; what was missed or invented has 0 and 374 mm. Deviation:
* HD95 is the larger of the two 95th percentiles of the distances between border voxels; there, of those between
  elements of the surfaces, weighted by their area.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from models.surfaces import Surface, hd95, larger_hd95, nearest_voxels, surface_dice

EMPTY_MM = 374.0  # the distance of what is not there: about the diagonal of BraTS's grid
NEIGHBOURS_26 = ndimage.generate_binary_structure(3, 3)
NEIGHBOURS_18 = ndimage.generate_binary_structure(3, 2)
MIN_DICE_2026 = 1e-6
SURROUNDINGS_2023 = 3  # voxels
IGNORED_MM3_2023 = 50


@dataclass(frozen=True)
class Parts:
    """The connected parts of a mask, numbered from 1."""

    map: np.ndarray  # int32 [X, Y, Z], 0 outside the mask
    sizes: np.ndarray  # voxels of each part; [0] is the outside
    surface: Surface
    of_border: np.ndarray  # the part of each border voxel [n]
    borders: list[np.ndarray]  # the border voxels of each part, as rows of the surface; [0] is empty


def find_parts(mask: np.ndarray, surface: Surface) -> Parts:
    """The parts of a mask, bool [X, Y, Z], with its surface."""
    parts, count = ndimage.label(mask, NEIGHBOURS_26)
    of_border = parts[tuple(surface.voxels.T)]
    order = np.argsort(of_border, kind="stable")
    borders = np.split(order, np.searchsorted(of_border[order], np.arange(1, count + 1)))
    return Parts(parts, np.bincount(parts.ravel(), minlength=count + 1), surface, of_border, borders)


def score_2026(predicted: Parts, true: Parts, spacing_mm) -> dict:
    """`dice`, `nsd`, `hd95_mm`, `tp`, `fp` and `fn` by the standard of BraTS 2026."""
    pairs, overlap = overlaps(true.map, predicted.map)  # [n, 2], [n]
    dice = 2 * overlap / (true.sizes[pairs[:, 0]] + predicted.sizes[pairs[:, 1]])
    matched = match(pairs[dice >= MIN_DICE_2026], dice[dice >= MIN_DICE_2026])
    fp, fn = len(predicted.sizes) - 1 - len(matched), len(true.sizes) - 1 - len(matched)
    scores = []
    for (true_part, predicted_part), its_dice in matched:
        distances = distances_mm(predicted, [predicted_part], true, [true_part], spacing_mm)
        scores.append((its_dice, surface_dice(*distances, min(spacing_mm)), hd95(*distances)))
    if not scores:
        scores = [(0.0, 0.0, EMPTY_MM) if fp or fn else (1.0, 1.0, 0.0)]
    dice, nsd, hd95_mm = np.mean(scores, axis=0).tolist()
    return {"dice": dice, "nsd": nsd, "hd95_mm": hd95_mm, "tp": len(matched), "fp": fp, "fn": fn}


def score_2023(predicted: Parts, true: Parts, spacing_mm) -> dict:
    """`dice`, `hd95_mm`, `tp`, `fp` and `fn` by the standard of BraTS 2023."""
    surroundings = ndimage.binary_dilation(true.map > 0, NEIGHBOURS_18, iterations=SURROUNDINGS_2023)
    surroundings, lesions = ndimage.label(surroundings, NEIGHBOURS_26)
    parts_of = overlaps(surroundings, true.map)[0]
    found_by = overlaps(surroundings, predicted.map)[0]
    covered = np.bincount(surroundings[(true.map > 0) & (predicted.map > 0)], minlength=lesions + 1)
    scores, missed = [], 0
    for lesion in range(1, lesions + 1):
        parts = parts_of[parts_of[:, 0] == lesion, 1]
        found = found_by[found_by[:, 0] == lesion, 1]
        size = true.sizes[parts].sum()
        if size * np.prod(spacing_mm) <= IGNORED_MM3_2023:
            continue
        if not len(found):
            missed += 1
            continue
        distances = distances_mm(predicted, found, true, parts, spacing_mm)
        scores.append((2 * covered[lesion] / (size + predicted.sizes[found].sum()), larger_hd95(*distances)))
    invented = len(predicted.sizes) - 1 - len(np.unique(found_by[:, 1]))
    tp = len(scores)
    scores += [(0.0, EMPTY_MM)] * (missed + invented)
    dice, hd95_mm = np.mean(scores, axis=0).tolist() if scores else (1.0, 0.0)
    return {"dice": dice, "hd95_mm": hd95_mm, "tp": tp, "fp": invented, "fn": missed}


def overlaps(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which parts of two maps [X, Y, Z] share voxels: pairs [n, 2], in ascending order, and how many voxels [n]."""
    both = (first > 0) & (second > 0)
    base = int(second.max(initial=0)) + 1
    codes, voxels = np.unique(first[both].astype(np.int64) * base + second[both], return_counts=True)
    return np.stack(np.divmod(codes, base), axis=1), voxels


def match(pairs: np.ndarray, dice: np.ndarray) -> list[tuple[tuple[int, int], float]]:
    """Of pairs [n, 2] with their Dice [n], those of the one-to-one matching with the largest sum."""
    (firsts, rows), (seconds, columns) = (np.unique(side, return_inverse=True) for side in pairs.T)
    gain = np.zeros((len(firsts), len(seconds)))
    gain[rows, columns] = dice + 1e-6  # of equal sums, that of more pairs
    chosen = zip(*linear_sum_assignment(gain, maximize=True), strict=True)
    return [((firsts[row], seconds[column]), gain[row, column] - 1e-6) for row, column in chosen if gain[row, column]]


def distances_mm(predicted: Parts, predicted_parts, true: Parts, true_parts, spacing_mm):
    """The distances between the surfaces of some parts, each taken as if there were no others: from the predicted
    border voxels float64 [n] and from the true ones [m]."""
    ours, theirs = (predicted, predicted_parts), (true, true_parts)
    return tuple(_distances_to(*own, *other, spacing_mm) for own, other in ((ours, theirs), (theirs, ours)))


def _distances_to(parts: Parts, chosen, others: Parts, others_chosen, spacing_mm) -> np.ndarray:
    rows = np.concatenate([parts.borders[part] for part in chosen])
    distance = parts.surface.distance_mm[rows]
    # Most of the nearest voxels of the whole mask are in the chosen parts: only the rest is looked for again.
    elsewhere = ~np.isin(others.of_border[parts.surface.nearest[rows]], others_chosen)
    if elsewhere.any():
        targets = np.concatenate([others.borders[part] for part in others_chosen])
        voxels = parts.surface.voxels[rows[elsewhere]]
        distance[elsewhere] = nearest_voxels(voxels, others.surface.voxels[targets], spacing_mm)[0]
    return distance
