"""Statistics of a table of scores: means with their intervals, paired comparisons of runs, calibration. Knows rows and
arrays, not files.

A row is one score as per_case.csv has it: KEYS, then a column per measure, None where a measure does not apply.
"""

from collections import Counter
from functools import lru_cache

import numpy as np
from scipy.stats import wilcoxon

from models.brats import REGION_CHANNELS, REGIONS

KEYS = ("run", "case", "space", "target", "empty", "trained_on")  # all other columns of a row are measures
COMPARED = ("dice", "lesion2026_dice", "hd95_mm")  # the measures that runs are compared by
FEW_CASES = 6  # with fewer, Wilcoxon's test cannot reach p < 0.05
RESAMPLES = 5000  # they place the ends of an interval to within 4 % of the standard error
BINS = 10  # of equal width, for the reliability of probabilities


# ---- rows ----------------------------------------------------------------------------------------------------------


def mean_region_dice(rows: list[dict]) -> dict[str, dict[str, float]]:
    """run -> case -> mean Dice of WT, TC and ET: what ranks cases from worst to best."""
    dice = {}
    for row in rows:
        if row["target"] in REGIONS:
            dice.setdefault(row["run"], {}).setdefault(row["case"], []).append(row["dice"])
    return {run: {case: sum(scores) / len(scores) for case, scores in cases.items()} for run, cases in dice.items()}


# ---- one run -------------------------------------------------------------------------------------------------------


def summarise(rows: list[dict]) -> dict:
    """run -> space -> target -> {"cases", "empty", and for each measure what `describe` says}.

    "empty" counts the cases where a rule decided the scores, because "both" masks, the "prediction" alone or the
    "truth" alone was empty. Measures that no case has are left out.
    """
    groups, summary = {}, {}
    for row in rows:
        groups.setdefault((row["run"], row["space"], row["target"]), []).append(row)
    for (run, space, target), chosen in groups.items():
        empty = Counter(row["empty"] for row in chosen)
        said = {"cases": len(chosen), "empty": {kind: empty[kind] for kind in ("both", "prediction", "truth")}}
        for column in chosen[0]:
            values = [row[column] for row in chosen if row[column] is not None]
            if values and column not in KEYS:
                said[column] = describe(values)
        summary.setdefault(run, {}).setdefault(space, {})[target] = said
    return summary


def describe(values) -> dict:
    """Mean with its 95 % interval [low, high], spread and range of numbers [n]; "interval" and "sd" (of a sample) are
    None for a single number."""
    values = np.asarray(values, float)
    low, first, median, third, high = np.quantile(values, (0, 0.25, 0.5, 0.75, 1)).tolist()
    return {
        "n": len(values),
        "mean": float(values.mean()),
        "interval": mean_interval(values),
        "median": median,
        "q1": first,
        "q3": third,
        "sd": float(values.std(ddof=1)) if len(values) > 1 else None,
        "min": low,
        "max": high,
    }


def mean_interval(values: np.ndarray) -> list[float] | None:
    """The 95 % percentile-bootstrap interval [low, high] of the mean of [n]; None for a single value."""
    if len(values) < 2:
        return None
    means = _resamples(len(values)) @ values / len(values)  # [RESAMPLES]
    return np.quantile(means, (0.025, 0.975)).tolist()


@lru_cache(maxsize=2)  # nearly all columns of a table have one of two lengths
def _resamples(count: int) -> np.ndarray:
    """How often each of `count` values comes in each of the draws with replacement: float64 [RESAMPLES, count]. The
    seed is fixed, so that the same table always gives the same intervals."""
    drawn = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    drawn += count * np.arange(RESAMPLES)[:, None]
    return np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(float)


# ---- several runs --------------------------------------------------------------------------------------------------


def compare_runs(rows: list[dict]) -> list[dict]:
    """The first run compared with each of the others, as by `compare`, and "holm_p": the p-value corrected for having
    looked at all targets and all runs of that space and measure."""
    first, *others = dict.fromkeys(row["run"] for row in rows)
    compared = [row for other in others for row in compare(rows, first, other)]
    families = {}
    for row in compared:
        families.setdefault((row["space"], row["measure"]), []).append(row)
    for family in families.values():
        for row, corrected in zip(family, holm([row["wilcoxon_p"] for row in family]), strict=True):
            row["holm_p"] = corrected
    return compared


def compare(rows: list[dict], first: str, second: str) -> list[dict]:
    """Per space, target and measure of COMPARED, how the run `second` differs from `first` on the cases that both have:
    the mean difference with its interval, and the p-value of Wilcoxon's two-sided signed-rank test (1 where no case
    differs)."""
    values = {}  # (space, target, measure) -> run -> case -> value
    for row in rows:
        for measure in COMPARED:
            if row.get(measure) is not None:
                by_run = values.setdefault((row["space"], row["target"], measure), {first: {}, second: {}})
                by_run.setdefault(row["run"], {})[row["case"]] = row[measure]
    compared = []
    for (space, target, measure), by_run in values.items():
        cases = [case for case in by_run[first] if case in by_run[second]]
        differences = np.array([by_run[second][case] - by_run[first][case] for case in cases])
        if cases:
            compared.append({
                "first": first, "second": second, "space": space, "target": target, "measure": measure,
                "cases": len(cases), "mean_difference": float(differences.mean()),
                "interval": mean_interval(differences),
                "wilcoxon_p": float(wilcoxon(differences).pvalue) if differences.any() else 1.0,
            })  # fmt: skip
    return compared


def note_on_few_cases(compared: list[dict]) -> str:
    """What a reader of `compare_runs` has to know where the cases are too few for a test; else ""."""
    if min((row["cases"] for row in compared), default=FEW_CASES) >= FEW_CASES:
        return ""
    return f"Fewer than {FEW_CASES} cases are too few for any difference to reach p < 0.05."


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction of a family of p-values, in the order given."""
    order = np.argsort(p_values)
    stepped = np.sort(p_values) * np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return corrected.tolist()


# ---- calibration ---------------------------------------------------------------------------------------------------


def reliability_counts(region_probabilities: np.ndarray, label: np.ndarray) -> np.ndarray:
    """What a reliability curve is made of, to be added up over cases.

    Args:
        region_probabilities: [3, ...] of TC, WT, ET.
        label: training labels [...].

    Returns:
        float64 [3 regions, 3, BINS]: per bin of probability the voxels, the sum of their probabilities, and how many of
        them truly are in the region.
    """
    counts = np.zeros((len(REGION_CHANNELS), 3, BINS))
    for region, probability, count in zip(REGION_CHANNELS, region_probabilities, counts, strict=True):
        # Nearly all voxels of a head lie in the lowest bin: only the others are sorted, and it gets what they leave.
        above = probability >= 1 / BINS
        chosen = probability[above]
        true = np.isin(label[above], REGIONS[region])
        place = np.minimum((chosen * BINS).astype(np.intp), BINS - 1)
        for row, weights in zip(count, (None, chosen, true), strict=True):
            row[:] = np.bincount(place, weights, BINS)
        all_true = sum(np.count_nonzero(label == value) for value in REGIONS[region])
        totals = probability.size, probability.sum(dtype=np.float64), all_true
        count[:, 0] += totals - count.sum(axis=1)
    return counts


def calibration_error(counts: np.ndarray) -> float | None:
    """The expected calibration error of a region from its counts [3, bins]: the distance between probability and
    frequency, in the mean over voxels. None where there is no voxel."""
    voxels, probability, true = counts
    return float(np.abs(probability - true).sum() / voxels.sum()) if voxels.any() else None
