"""Our scores are those of the official package of BraTS 2026, run on the same pairs by tests/oracles/brats_2026.py."""

import json
import math

import pytest
from conftest import ROOT
from oracles.pairs import ONE_MM, real_pairs, synthetic_pairs

from models.metrics import score_case

GOLDEN = json.loads((ROOT / "tests/golden/brats_2026.json").read_text())
OFFICIAL = {
    "dice": "global_bin_dsc",
    "hd95_mm": "hd95_mm",
    "nsd_1mm": "nsd_1mm",
    "nsd_0mm": "global_bin_nsd",
    "lesion2026_dice": "sq_dsc",
    "lesion2026_nsd": "sq_nsd",
    "lesion2026_hd95_mm": "sq_hd95",
    "lesion2026_tp": "tp",
    "lesion2026_fp": "fp",
    "lesion2026_fn": "fn",
}


def check(name, prediction, truth, spacing_mm):
    for target, scores in score_case(prediction, truth, spacing_mm).items():
        official = GOLDEN[name][target]
        for column, key in OFFICIAL.items():
            value = official.get(key, official["sq_hd95" if "hd95" in key else "sq_nsd"])  # no surface: the same rule
            if math.isnan(value):  # both masks are empty
                value = 0.0 if "hd95" in column else 1.0
            assert scores[column] == pytest.approx(min(value, 374), abs=1e-6), (name, target, column)
        if spacing_mm == ONE_MM and official["global_bin_dsc"] > 0:  # in voxels, and infinite without an overlap
            assert scores["hd95_mm"] == pytest.approx(official["global_bin_hd95"], abs=1e-6)


@pytest.mark.parametrize("pair", list(synthetic_pairs()), ids=lambda pair: pair[0])
def test_synthetic_pairs(pair):
    check(*pair)


def test_pairs_from_real_cases(real_cases):
    pairs = 0
    for pair in real_pairs(real_cases):
        check(*pair)
        pairs += 1
    if not pairs:
        pytest.skip("none of the real cases is one that the golden values were computed on")
