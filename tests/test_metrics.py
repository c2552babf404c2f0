"""Dice, against hand-computed cases and MONAI."""

import pytest
import torch
from monai.metrics import compute_dice

from models.metrics import confusion, dice_per_target, mean_label_dice, volumes_per_target


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


def test_volumes_are_overlap_predicted_true():
    counts = confusion(torch.tensor([3, 3, 0, 2]), torch.tensor([3, 0, 0, 1]))
    assert volumes_per_target(counts)["ET"] == (1, 2, 1)
    assert volumes_per_target(counts)["WT"] == (2, 3, 2)
