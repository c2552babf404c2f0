"""Scores of label maps, against hand-computed cases and MONAI. Surfaces and lesions have tests of their own."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from monai.metrics import compute_confusion_matrix_metric, compute_dice, get_confusion_matrix

from models.metrics import confusion, dice_per_target, mean_label_dice, pooled_dice, score_case, volumes_per_target

# ---- one case ------------------------------------------------------------------------------------------------------


def cube(start: int, label: int = 3, shape=(12, 10, 10)) -> np.ndarray:
    """A label map with a cube of 4 x 4 x 4 voxels that begins at `start` along the first axis."""
    volume = np.zeros(shape, np.uint8)
    volume[start : start + 4, 3:7, 3:7] = label
    return volume


def test_a_cube_that_is_one_voxel_off():
    scores = score_case(cube(3), cube(2), (2.0, 1.0, 1.0))["ET"]
    assert scores["dice"] == scores["sensitivity"] == scores["precision"] == 48 / 64
    # Of 56 border voxels 16 are in the face that stands out, 2 mm off; 4 of the opposite face are 1 mm inside.
    assert scores["hd95_mm"] == 2
    assert scores["nsd_1mm"] == pytest.approx(40 / 56) and scores["nsd_0mm"] == pytest.approx(36 / 56)
    assert scores["predicted_ml"] == scores["true_ml"] == pytest.approx(0.128)
    assert scores["volume_error_ml"] == 0 and scores["empty"] == ""


def test_the_columns_are_those_of_the_table():
    scores = score_case(cube(3), cube(2), (1.0, 1.0, 1.0))
    assert list(scores) == ["WT", "TC", "ET", "NCR", "ED"]
    columns = ["dice", "sensitivity", "precision", "hd95_mm", "nsd_1mm", "nsd_0mm", "predicted_ml", "true_ml",
               "volume_error_ml", "empty", "lesion2026_dice", "lesion2026_nsd", "lesion2026_hd95_mm", "lesion2026_tp",
               "lesion2026_fp", "lesion2026_fn", "lesion2023_dice", "lesion2023_hd95_mm", "lesion2023_tp",
               "lesion2023_fp", "lesion2023_fn"]  # fmt: skip
    assert all(list(row) == columns for row in scores.values())
    assert [row["lesion2023_dice"] is None for row in scores.values()] == [False, False, False, True, True]
    assert {type(value) for row in scores.values() for value in row.values()} == {float, int, str, type(None)}


def test_too_much_has_a_low_precision_and_a_positive_volume_error():
    scores = score_case(cube(2) + cube(6), cube(2), (1.0, 1.0, 1.0))["ET"]
    assert (scores["sensitivity"], scores["precision"]) == (1, 0.5)
    assert scores["volume_error_ml"] == pytest.approx(0.064)


def test_sensitivity_and_precision_are_those_of_monai():
    prediction, truth = np.random.RandomState(0).randint(0, 4, (2, 12, 12, 12)).astype(np.uint8)
    onehot = [torch.from_numpy(np.eye(4, dtype=np.float32)[m]).permute(3, 0, 1, 2)[None] for m in (prediction, truth)]
    counts = get_confusion_matrix(*onehot, include_background=False)
    scores = score_case(prediction, truth, (1.0, 1.0, 1.0))
    for column, metric in (("sensitivity", "sensitivity"), ("precision", "precision"), ("dice", "f1 score")):
        expected = compute_confusion_matrix_metric(metric, counts)[0].tolist()
        assert [scores[target][column] for target in ("NCR", "ED", "ET")] == pytest.approx(expected)


def test_a_rule_decides_where_a_mask_is_empty_and_the_row_says_which():
    some, none = cube(3, label=1), np.zeros((12, 10, 10), np.uint8)
    for prediction, truth, empty in ((some, none, "truth"), (none, some, "prediction"), (none, none, "both")):
        scores = score_case(prediction, truth, (1.0, 1.0, 1.0))
        right = float(empty == "both")
        assert [row["empty"] for row in scores.values()] == [empty, empty, "both", empty, "both"]
        for column in ("dice", "sensitivity", "precision", "nsd_1mm", "nsd_0mm", "lesion2026_dice", "lesion2026_nsd"):
            assert scores["WT"][column] == right and scores["ET"][column] == 1
        for column in ("hd95_mm", "lesion2026_hd95_mm", "lesion2023_hd95_mm"):
            assert scores["WT"][column] == 374 * (1 - right) and scores["ET"][column] == 0


def test_where_the_tumour_is_on_the_grid_does_not_matter():
    small = score_case(cube(3), cube(2), (1.0, 1.2, 0.9))
    large = [np.pad(volume, ((30, 5), (0, 50), (20, 0))) for volume in (cube(3), cube(2))]
    assert score_case(*large, (1.0, 1.2, 0.9)) == small


@pytest.mark.parametrize("spacing_mm", [1 + 1.2e-7, 1 - 6e-8])
def test_a_spacing_in_float32_is_what_it_was_meant_to_be(spacing_mm):
    assert score_case(cube(3), cube(2), [spacing_mm] * 3) == score_case(cube(3), cube(2), (1.0, 1.0, 1.0))


def test_the_processes_that_score_cases_need_no_torch():
    program = "import sys; import models.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


# ---- Dice while training -------------------------------------------------------------------------------------------


def test_a_hand_computed_case():
    truth = torch.tensor([0, 1, 1, 2, 2, 2, 3, 3])
    prediction = torch.tensor([0, 1, 2, 2, 2, 0, 3, 1])
    dice = dice_per_target(confusion(prediction, truth))
    assert dice["NCR"] == pytest.approx(2 * 1 / (2 + 2))
    assert dice["ED"] == pytest.approx(2 * 2 / (3 + 3))
    assert dice["ET"] == pytest.approx(2 * 1 / (1 + 2))
    assert dice["WT"] == pytest.approx(2 * 6 / (6 + 7))
    assert dice["TC"] == pytest.approx(2 * 3 / (3 + 4))
    assert mean_label_dice(dice) == pytest.approx((0.5 + 2 / 3 + 2 / 3) / 3)


def test_labels_agree_with_monai():
    generator = torch.Generator().manual_seed(0)
    truth, prediction = (torch.randint(0, 4, (16, 16, 16), generator=generator) for _ in range(2))
    onehot = [torch.nn.functional.one_hot(m, 4).permute(3, 0, 1, 2)[None] for m in (prediction, truth)]
    expected = compute_dice(*onehot)[0]  # [4]
    dice = dice_per_target(confusion(prediction, truth))
    assert [dice["NCR"], dice["ED"], dice["ET"]] == pytest.approx(expected[1:].tolist())


def test_both_empty_is_1_and_one_empty_is_0():
    empty, full = torch.zeros(8, dtype=torch.long), torch.full((8,), 3)
    assert set(dice_per_target(confusion(empty, empty)).values()) == {1.0}
    assert dice_per_target(confusion(empty, full))["ET"] == 0
    assert dice_per_target(confusion(full, empty))["WT"] == 0


def test_the_best_epoch_is_that_of_all_voxels_over_the_labels_that_the_truth_has():
    """The second case has oedema only, none has NCR: what predicts nothing has no points for either."""
    truths = [torch.tensor([3, 3, 2, 0, 0, 0]), torch.tensor([2, 2, 2, 2, 0, 0])]
    predictions = [torch.tensor([3, 0, 2, 0, 0, 3]), torch.tensor([2, 2, 2, 0, 0, 0])]
    dice = pooled_dice(torch.stack([confusion(*pair) for pair in zip(predictions, truths, strict=True)]))
    ed, et = 2 * 4 / (5 + 4), 2 * 1 / (2 + 2)
    assert dice["ED"] == pytest.approx(ed) and dice["ET"] == pytest.approx(et) and math.isnan(dice["NCR"])
    assert dice["mean"] == pytest.approx((ed + et) / 2) and dice["WT"] == pytest.approx(2 * 5 / (6 + 7))
    nothing = torch.stack([confusion(torch.zeros(6, dtype=torch.long), truth) for truth in truths])
    assert pooled_dice(nothing)["mean"] == 0
    assert math.isnan(pooled_dice(confusion(truths[0] * 0, truths[0] * 0)[None])["mean"])


def test_volumes_are_overlap_predicted_true():
    counts = confusion(torch.tensor([3, 3, 0, 2]), torch.tensor([3, 0, 0, 1]))
    assert volumes_per_target(counts)["ET"] == (1, 2, 1)
    assert volumes_per_target(counts)["WT"] == (2, 3, 2)
