"""The small-ET rule and its threshold."""

import numpy as np
import torch

from models.inference.small_et import choose_small_et_ml, small_et_to_ncr


def test_a_small_et_becomes_ncr_and_a_large_one_stays():
    label = torch.tensor([0, 1, 2, 3, 3, 2], dtype=torch.uint8)  # 2 voxels of ET
    assert small_et_to_ncr(label, voxel_ml=0.001, threshold_ml=0.0025).tolist() == [0, 1, 2, 1, 1, 2]
    assert small_et_to_ncr(label, voxel_ml=0.001, threshold_ml=0.002).tolist() == [0, 1, 2, 3, 3, 2]
    assert small_et_to_ncr(label, voxel_ml=0.001, threshold_ml=0).tolist() == [0, 1, 2, 3, 3, 2]
    assert small_et_to_ncr(label, 0.001, 1.0).dtype == torch.uint8


def test_the_threshold_frees_the_cases_that_have_no_et():
    # (predicted ml, Dice as predicted, Dice with no ET predicted)
    cases = [(0.1, 0.0, 1.0), (0.3, 0.0, 1.0), (0.5, 0.6, 0.0), (8.0, 0.9, 0.0)]
    assert np.isclose(choose_small_et_ml(cases), 0.4)  # halfway between 0.3 and 0.5


def test_a_threshold_may_cost_a_case_if_it_frees_more():
    cases = [(0.1, 0.2, 0.0), (0.3, 0.0, 1.0), (8.0, 0.9, 0.0)]
    assert np.isclose(choose_small_et_ml(cases), 4.15)


def test_no_threshold_where_none_is_better():
    assert choose_small_et_ml([(0.1, 0.2, 0.0), (0.3, 0.5, 0.0), (8.0, 0.9, 0.0)]) == 0
    assert choose_small_et_ml([(0.0, 1.0, 1.0), (8.0, 0.9, 0.0)]) == 0  # it would change nothing
    assert choose_small_et_ml([(0.1, 0.0, 1.0)]) == 0  # it would leave no case its ET
