"""The table of tests/benchmarks/recipe.py, by hand."""

import numpy as np
import pytest

from tests.benchmarks import recipe


def row(case, target, dice, true_voxels=1, seed=0):
    return {"case": case, "target": target, "dice_last": str(dice), "true_voxels": str(true_voxels), "seed": str(seed)}


def rows_of(case, ncr, ed, et, wt, tc, **options):
    values = {"NCR": ncr, "ED": ed, "ET": et, "WT": wt, "TC": tc}
    return [row(case, target, dice, int(dice is not None), **options) if dice is not None else row(case, target, 1, 0)
            for target, dice in values.items()]  # fmt: skip


def test_a_score_is_the_mean_over_seeds_and_nothing_where_the_truth_is_empty():
    rows = rows_of("a", 0.2, 0.4, None, 0.6, 0.3) + rows_of("a", 0.4, 0.6, None, 0.8, 0.5, seed=1)
    scores = recipe.scores_of(rows)["a"]
    assert recipe.COLUMNS == ("NCR", "ED", "ET", "WT", "TC")
    assert scores == pytest.approx([0.3, 0.5, np.nan, 0.7, 0.4], nan_ok=True)


def test_a_case_without_a_label_is_left_out_of_the_mean_of_that_label_alone():
    rows = rows_of("a", 0.2, 0.4, None, 0.6, 0.3) + rows_of("b", 0.4, 0.8, 0.5, 0.8, 0.5)
    found = recipe.means(np.array(list(recipe.scores_of(rows).values())))
    assert found == pytest.approx([(0.3 + 0.6 + 0.5) / 3, 0.7, 0.4, 0.5])


def test_the_interval_of_the_difference_is_of_pairs():
    """Cases that differ much from each other, but a second variant that is better by the same in each."""
    generator = np.random.default_rng(1)
    first = {f"case {i}": generator.uniform(0.1, 0.8, 5) for i in range(12)}
    second = {case: scores + 0.05 for case, scores in first.items()}
    second["another"] = np.ones(5)
    change, (low, high), better, count = recipe.difference(first, second)
    assert change == pytest.approx(np.full(4, 0.05)) and (better, count) == (12, 12)
    assert low == pytest.approx(np.full(4, 0.05)) and high == pytest.approx(np.full(4, 0.05))


def test_the_interval_is_about_that_of_a_normal_mean():
    generator = np.random.default_rng(2)
    first = {f"case {i}": np.full(5, 0.4) for i in range(40)}
    second = {case: scores + generator.normal(0.1, 0.05) for case, scores in first.items()}
    changes = np.array([second[case][0] - first[case][0] for case in first])
    _, (low, high), _, _ = recipe.difference(first, second)
    half = 1.96 * changes.std() / 40**0.5
    assert low[1] == pytest.approx(changes.mean() - half, abs=0.003)
    assert high[1] == pytest.approx(changes.mean() + half, abs=0.003)
