"""Means, intervals, paired comparisons and calibration, against scipy and cases computed by hand."""

import numpy as np
import pytest
from scipy.stats import bootstrap, wilcoxon

from models.brats import REGIONS
from models.evaluation.statistics import (
    BINS,
    calibration_error,
    compare,
    compare_runs,
    describe,
    holm,
    mean_interval,
    mean_region_dice,
    note_on_few_cases,
    reliability_counts,
    summarise,
)


def row(run="a", case="1", target="WT", space="native", empty="", **measures):
    return {"run": run, "case": case, "space": space, "target": target, "trained_on": False, "empty": empty, **measures}


def rows(run, dice, **fixed):
    return [row(run, case, dice=value, **fixed) for case, value in dice.items()]


# ---- rows ----------------------------------------------------------------------------------------------------------


def test_cases_are_ranked_by_the_mean_of_the_regions_alone():
    table = [row(target=target, dice=dice)
             for target, dice in {"WT": 0.9, "TC": 0.6, "ET": 0.3, "NCR": 0.0, "ED": 0.0}.items()]  # fmt: skip
    assert mean_region_dice(table) == {"a": {"1": pytest.approx(0.6)}}


# ---- one run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [5, 20, 200])
def test_the_interval_is_scipys_percentile_bootstrap(count):
    values = np.random.default_rng(count).beta(8, 2, count)
    expected = bootstrap((values,), np.mean, method="percentile", n_resamples=20000, rng=1).confidence_interval
    standard_error = values.std() / np.sqrt(count)
    assert mean_interval(values) == pytest.approx([expected.low, expected.high], abs=0.1 * standard_error)


def test_the_interval_of_the_same_numbers_is_the_same_every_time():
    values = np.random.default_rng(0).random(30)
    assert mean_interval(values) == mean_interval(values.copy())
    assert mean_interval(np.full(30, 0.5)) == [0.5, 0.5]


def test_a_column_is_described_by_its_moments_and_quantiles():
    said = describe([4.0, 1.0, 2.0, 3.0])
    assert said["mean"] == 2.5 and said["median"] == 2.5 and (said["min"], said["max"], said["n"]) == (1, 4, 4)
    assert (said["q1"], said["q3"]) == (1.75, 3.25)
    assert said["sd"] == pytest.approx((5 / 3) ** 0.5)


def test_a_single_case_has_no_interval_and_no_deviation():
    said = describe([0.8])
    assert said["interval"] is None and said["sd"] is None
    assert said["mean"] == said["median"] == said["q1"] == 0.8


def test_every_measure_of_every_run_space_and_target_is_summarised():
    table = [
        row("a", "1", "WT", dice=0.8, hd95_mm=2.0), row("a", "2", "WT", dice=0.6, hd95_mm=4.0),
        row("a", "1", "ET", dice=0.5, hd95_mm=8.0), row("a", "1", "WT", "network", dice=0.9, hd95_mm=1.0),
        row("b", "1", "WT", dice=0.1, hd95_mm=9.0),
    ]  # fmt: skip
    summary = summarise(table)
    assert summary["a"]["native"]["WT"]["dice"]["mean"] == pytest.approx(0.7)
    assert summary["a"]["native"]["WT"]["hd95_mm"]["mean"] == 3 and summary["a"]["native"]["WT"]["cases"] == 2
    assert summary["a"]["native"]["ET"]["hd95_mm"]["max"] == 8
    assert summary["a"]["network"]["WT"]["dice"]["mean"] == 0.9 and summary["b"]["native"]["WT"]["dice"]["n"] == 1


def test_values_that_do_not_apply_are_left_out_of_the_mean():
    table = [row(case="1", dice=0.8, lesion2026_dice=None), row(case="2", dice=0.6, lesion2026_dice=0.5)]
    said = summarise(table)["a"]["native"]["WT"]
    assert said["lesion2026_dice"]["n"] == 1 and said["lesion2026_dice"]["mean"] == 0.5 and said["dice"]["n"] == 2
    assert "lesion2026_dice" not in summarise(table[:1])["a"]["native"]["WT"]


def test_how_often_a_rule_decided_is_counted_by_which_mask_was_empty():
    table = [row(case=str(number), empty=empty, dice=1.0)
             for number, empty in enumerate(["", "both", "both", "truth", ""])]  # fmt: skip
    assert summarise(table)["a"]["native"]["WT"]["empty"] == {"both": 2, "prediction": 0, "truth": 1}


def test_no_rows_give_no_summary():
    assert summarise([]) == {}


# ---- several runs --------------------------------------------------------------------------------------------------


def test_runs_are_compared_pair_by_pair_whatever_the_order_of_their_rows():
    zeros = {str(case): 0.0 for case in range(1, 6)}
    table = rows("b", {"5": 0.9, "4": 0.7, "3": 0.5, "2": 0.3, "1": 0.1}) + rows("a", zeros)
    (compared,) = compare(table, "a", "b")
    assert compared["mean_difference"] == pytest.approx(0.5) and compared["cases"] == 5
    # All of five differences are positive: exactly 2 of the 2^5 equally likely signs are as extreme.
    assert compared["wilcoxon_p"] == pytest.approx(2 / 32)
    assert compare(table, "b", "a")[0]["mean_difference"] == pytest.approx(-0.5)
    assert compare(table + rows("c", zeros), "a", "c")[0]["wilcoxon_p"] == 1


def test_a_comparison_is_scipys_test_and_bootstrap_of_the_differences():
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 30))
    named = [{str(case): value for case, value in enumerate(values)} for values in (first, second)]
    (compared,) = compare(rows("a", named[0]) + rows("b", named[1]), "a", "b")
    assert compared["wilcoxon_p"] == pytest.approx(wilcoxon(second, first).pvalue)
    expected = bootstrap((second - first,), np.mean, method="percentile", rng=0).confidence_interval
    assert compared["interval"] == pytest.approx([expected.low, expected.high], abs=0.01)


def test_only_cases_that_both_runs_have_a_value_for_are_compared():
    table = [row("a", "1", dice=0.5, hd95_mm=None), row("b", "1", dice=0.6, hd95_mm=3.0), row("a", "2", dice=0.1),
             row("b", "3", dice=0.9)]  # fmt: skip
    (compared,) = compare(table, "a", "b")
    assert compared["measure"] == "dice" and compared["cases"] == 1 and compared["interval"] is None
    assert compared["mean_difference"] == pytest.approx(0.1) and compared["wilcoxon_p"] == 1


@pytest.mark.parametrize("cases", [5, 6])
def test_few_cases_are_those_with_which_scipys_test_cannot_reach_five_percent(cases):
    differences = {str(case): case + 1.0 for case in range(cases)}  # all of one sign: the smallest p there is
    compared = compare_runs(rows("a", dict.fromkeys(differences, 0.0)) + rows("b", differences))
    assert bool(note_on_few_cases(compared)) == (compared[0]["wilcoxon_p"] >= 0.05)
    assert note_on_few_cases([]) == ""


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.4 times 4, 3, 2, 1 is 0.04, 0.06, 0.06, 0.4; none may be below the one before.
    assert holm([0.03, 0.01, 0.4, 0.02]) == pytest.approx([0.06, 0.04, 0.4, 0.06])
    assert holm([0.9, 0.8]) == [1, 1] and holm([]) == []


def test_the_correction_is_for_all_targets_and_runs_of_a_space_and_measure():
    rng = np.random.default_rng(0)
    table = [row(run, str(case), target, dice=rng.random(), hd95_mm=rng.random())
             for run in "abc" for target in ("WT", "TC") for case in range(8)]  # fmt: skip
    table += [row(run, str(case), "WT", "network", dice=rng.random()) for run in "abc" for case in range(8)]
    compared = compare_runs(table)
    assert {(r["first"], r["second"]) for r in compared} == {("a", "b"), ("a", "c")}
    for space, measure, size in (("native", "dice", 4), ("native", "hd95_mm", 4), ("network", "dice", 2)):
        family = [r for r in compared if r["space"] == space and r["measure"] == measure]
        assert len(family) == size
        smallest = min(family, key=lambda r: r["wilcoxon_p"])
        assert smallest["holm_p"] == pytest.approx(min(1, size * smallest["wilcoxon_p"]))


def test_one_run_is_compared_with_nothing():
    assert compare_runs(rows("a", {"1": 0.5})) == []


# ---- calibration ---------------------------------------------------------------------------------------------------


def test_a_hand_computed_reliability():
    label = np.array([0, 3, 3, 1, 2])
    probability = np.array([0.05, 0.95, 1.0, 0.32, 0.1], np.float32)
    counts = reliability_counts(np.stack([probability] * 3), label)  # [3, 3, BINS]
    assert counts.shape == (3, 3, BINS)
    assert counts[0, 0].tolist() == [1, 1, 0, 1, 0, 0, 0, 0, 0, 2]
    assert counts[0, 1] == pytest.approx([0.05, 0.1, 0, 0.32, 0, 0, 0, 0, 0, 1.95])
    assert counts[0, 2].tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 2]  # TC is 1 and 3
    assert counts[1, 2].tolist() == [0, 1, 0, 1, 0, 0, 0, 0, 0, 2]  # WT
    assert counts[2, 2].tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0, 2]  # ET
    # WT: |0.05 - 0| + |0.1 - 1| + |0.32 - 1| + |1.95 - 2| over five voxels
    assert calibration_error(counts[1]) == pytest.approx((0.05 + 0.9 + 0.68 + 0.05) / 5)


def test_the_counts_are_numpys_weighted_histograms():
    rng = np.random.default_rng(0)
    probabilities = rng.random((3, 12, 10, 8), np.float32) ** 3
    label = rng.integers(0, 4, (12, 10, 8)).astype(np.uint8)
    counts = reliability_counts(probabilities, label)
    for number, region in enumerate(("TC", "WT", "ET")):
        p = probabilities[number].ravel()
        true = np.isin(label.ravel(), REGIONS[region]).astype(float)
        for row_, weights in zip(counts[number], (None, p, true), strict=True):
            assert row_ == pytest.approx(np.histogram(p, BINS, (0, 1), weights=weights)[0], abs=1e-3)


def test_probabilities_that_come_true_as_often_as_they_say_have_no_error():
    counts = np.array([[100, 10], [25, 7.5], [25, 7.5]])
    assert calibration_error(counts) == 0
    assert calibration_error(np.zeros((3, BINS))) is None
