"""Lesion-wise scores: hand-computed cases, and BraTS 2023 against its definition, lesion by lesion.

That the scores of BraTS 2026 are the official package's is tested in test_brats_2026.py.
"""

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance
from oracles.pairs import synthetic_pairs
from scipy.ndimage import binary_dilation, generate_binary_structure, label

from models.lesions import find_parts, match, score_2023, score_2026
from models.surfaces import surfaces

ONE_MM = np.ones(3)


def scored(score, predicted, true, spacing_mm=ONE_MM) -> dict:
    spacing_mm = np.array(spacing_mm)
    both = surfaces(predicted, true, spacing_mm)
    return score(*(find_parts(mask, s) for mask, s in zip((predicted, true), both, strict=True)), spacing_mm)


def boxes(*places) -> np.ndarray:
    """A mask, bool [60, 12, 12], of boxes 6 x 6 along the last axes, each from one place to another along the first."""
    mask = np.zeros((60, 12, 12), bool)
    for start, stop in places:
        mask[start:stop, 3:9, 3:9] = True
    return mask


# ---- BraTS 2026 ----------------------------------------------------------------------------------------------------


def test_2026_means_are_over_the_matched_lesions_and_what_was_missed_or_invented_only_counts():
    scores = scored(score_2026, boxes((0, 10), (50, 60)), boxes((2, 12), (30, 40), (44, 48)))
    assert scores["dice"] == pytest.approx(2 * 8 / 20)
    assert scores["hd95_mm"] == pytest.approx(2) and 0 < scores["nsd"] < 1
    assert (scores["tp"], scores["fp"], scores["fn"]) == (1, 1, 2)


def test_2026_one_predicted_part_serves_one_lesion():
    both = scored(score_2026, boxes((0, 30)), boxes((0, 10), (12, 30)))
    assert (both["tp"], both["fp"], both["fn"]) == (1, 0, 1)
    assert both["dice"] == pytest.approx(2 * 18 / 48)
    assert scored(score_2026, boxes((0, 10), (12, 30)), boxes((0, 30)))["fp"] == 1


def test_2026_distances_of_a_pair_leave_the_other_lesions_out():
    """The prediction of the first lesion ends beside the second one, which has a perfect one of its own."""
    alone = scored(score_2026, boxes((0, 28)), boxes((0, 4)))
    both = scored(score_2026, boxes((0, 28), (30, 40)), boxes((0, 4), (30, 40)))
    assert both["hd95_mm"] == pytest.approx(alone["hd95_mm"] / 2) and alone["hd95_mm"] > 20
    assert both["nsd"] == pytest.approx((alone["nsd"] + 1) / 2)


def test_2026_matches_for_the_largest_sum_and_not_the_best_pair_first():
    pairs, dice = np.array([[1, 1], [1, 2], [2, 1]]), np.array([0.6, 0.55, 0.5])
    assert {(int(a), int(b)) for (a, b), _ in match(pairs, dice)} == {(1, 2), (2, 1)}
    assert sorted(its for _, its in match(pairs, dice)) == pytest.approx([0.5, 0.55])


def test_2026_parts_that_touch_at_a_corner_are_one():
    mask = np.zeros((4, 4, 4), bool)
    mask[:2, :2, :2] = mask[2:, 2:, 2:] = True
    assert scored(score_2026, mask, mask)["tp"] == 1


def test_2026_empty_masks():
    some, none = boxes((0, 10), (20, 30)), boxes()
    perfect = {"dice": 1, "nsd": 1, "hd95_mm": 0, "tp": 0, "fp": 0, "fn": 0}
    assert scored(score_2026, none, none) == perfect
    assert scored(score_2026, none, some) == {"dice": 0, "nsd": 0, "hd95_mm": 374, "tp": 0, "fp": 0, "fn": 2}
    assert scored(score_2026, some, none) == {"dice": 0, "nsd": 0, "hd95_mm": 374, "tp": 0, "fp": 2, "fn": 0}
    assert scored(score_2026, boxes((40, 50)), some)["hd95_mm"] == 374


# ---- BraTS 2023 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gap", "lesions"), [(6, 1), (7, 2)])
def test_2023_lesions_whose_surroundings_meet_are_one(gap, lesions):
    true = boxes((0, 10), (10 + gap, 20 + gap))
    assert scored(score_2023, true, true) == {"dice": 1, "hd95_mm": 0, "tp": lesions, "fp": 0, "fn": 0}


@pytest.mark.parametrize(("gap", "found"), [(2, 1), (3, 0)])
def test_2023_a_lesion_is_found_by_what_reaches_into_its_surroundings(gap, found):
    scores = scored(score_2023, boxes((10 + gap, 20 + gap)), boxes((0, 10)))
    assert (scores["tp"], scores["fn"], scores["fp"]) == (found, 1 - found, 1 - found)
    assert scores["dice"] == 0


def test_2023_what_was_missed_or_invented_has_0_and_374_mm():
    scores = scored(score_2023, boxes((0, 10), (50, 60)), boxes((0, 10), (25, 35)))
    assert scores == pytest.approx({"dice": 1 / 3, "hd95_mm": 374 * 2 / 3, "tp": 1, "fp": 1, "fn": 1})


def test_2023_lesions_of_50_mm3_are_ignored_and_so_is_what_was_predicted_there():
    small, large = np.zeros((2, 30, 12, 12), bool)
    small[:5, :5, :2] = large[:5, :5, :2] = True  # 50 voxels
    large[5, 0, 0] = True
    none = np.zeros_like(small)
    perfect = {"dice": 1, "hd95_mm": 0, "tp": 0, "fp": 0, "fn": 0}
    assert scored(score_2023, none, small) == perfect
    assert scored(score_2023, large, small) == perfect
    assert scored(score_2023, none, large)["fn"] == 1
    assert scored(score_2023, none, small, spacing_mm=(1.0, 1.0, 1.1))["fn"] == 1


def test_2023_an_invented_part_counts_whatever_its_size():
    predicted = boxes((0, 10))
    predicted[40, 5, 5] = True
    assert scored(score_2023, predicted, boxes((0, 10)))["dice"] == pytest.approx(0.5)


def test_2023_one_predicted_part_may_serve_two_lesions():
    scores = scored(score_2023, boxes((0, 30)), boxes((0, 10), (20, 30)))
    assert (scores["tp"], scores["fp"], scores["fn"]) == (2, 0, 0)
    assert scores["dice"] == pytest.approx(2 * 10 / 40)


def test_2023_empty_masks():
    some, none = boxes((0, 10), (20, 30)), boxes()
    assert scored(score_2023, none, none) == {"dice": 1, "hd95_mm": 0, "tp": 0, "fp": 0, "fn": 0}
    assert scored(score_2023, none, some) == {"dice": 0, "hd95_mm": 374, "tp": 0, "fp": 0, "fn": 2}
    assert scored(score_2023, some, none) == {"dice": 0, "hd95_mm": 374, "tp": 0, "fp": 2, "fn": 0}


@pytest.mark.parametrize("pair", list(synthetic_pairs()), ids=lambda pair: pair[0])
@pytest.mark.parametrize("labels", [(1, 2, 3), (3,)], ids=["WT", "ET"])
def test_2023_by_its_definition(pair, labels):
    _, prediction, truth, spacing_mm = pair
    masks = np.isin(prediction, labels), np.isin(truth, labels)
    assert scored(score_2023, *masks, spacing_mm) == pytest.approx(by_definition_2023(*masks, spacing_mm), abs=1e-4)


def by_definition_2023(predicted, true, spacing_mm) -> dict:
    """Each lesion in an array of its own, its HD95 by MONAI."""
    around, everywhere = generate_binary_structure(3, 2), generate_binary_structure(3, 3)
    places, count = label(binary_dilation(true, around, iterations=3), everywhere)
    parts, invented = label(predicted, everywhere)
    invented = set(range(1, invented + 1))
    scores, tp, fn = [], 0, 0
    for place in range(1, count + 1):
        lesion = true & (places == place)
        found = set(np.unique(parts[binary_dilation(lesion, around, iterations=3)]).tolist()) - {0}
        invented -= found
        if lesion.sum() * np.prod(spacing_mm) <= 50:
            continue
        if not found:
            fn += 1
            scores.append((0.0, 374.0))
            continue
        tp += 1
        its_prediction = np.isin(parts, list(found))
        dice = 2 * (its_prediction & lesion).sum() / (its_prediction.sum() + lesion.sum())
        scores.append((dice, monai_hd95(its_prediction, lesion, spacing_mm)))
    scores += [(0.0, 374.0)] * len(invented)
    dice, hd95_mm = np.mean(scores, axis=0) if scores else (1.0, 0.0)
    return {"dice": dice, "hd95_mm": hd95_mm, "tp": tp, "fp": len(invented), "fn": fn}


def monai_hd95(predicted, true, spacing_mm) -> float:
    masks = [torch.from_numpy(mask[None, None].astype(np.float32)) for mask in (predicted, true)]
    return compute_hausdorff_distance(*masks, include_background=True, percentile=95, spacing=tuple(spacing_mm)).item()
