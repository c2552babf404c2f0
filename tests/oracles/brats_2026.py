#!/usr/bin/env python3
"""What the official package of BraTS 2026 says of our pairs: writes tests/golden/brats_2026.json, which the tests
compare with.

panoptica wants a numpy below 2.3, so it has an environment of its own:

  python -m venv /tmp/brats-evaluation
  /tmp/brats-evaluation/bin/pip install brats-evaluation==0.0.10 panoptica==2.1.7
  /tmp/brats-evaluation/bin/python tests/oracles/brats_2026.py FOLDER

FOLDER holds the twelve BraTS 2018 cases that pairs.py names. What the package leaves undefined is NaN; distances to
what is not there are infinite.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
from brats_evaluation import config_path
from pairs import real_pairs, synthetic_pairs
from panoptica import Metric, Panoptica_Evaluator

GOLDEN = Path(__file__).parents[1] / "golden/brats_2026.json"
GROUPS = {"WT": ("wt", (1, 2, 3)), "TC": ("tc", (1, 3)), "ET": ("et", 3), "NCR": ("netc", 1), "ED": ("snfh", 2)}
KEYS = ("global_bin_dsc", "global_bin_nsd", "global_bin_hd95", "sq_dsc", "sq_nsd", "sq_hd95", "tp", "fp", "fn")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="with the real cases")
    folder = parser.parse_args().folder
    evaluator = Panoptica_Evaluator.load_from_config(str(config_path("gli")))
    golden = {"packages": {name: version(name) for name in ("brats-evaluation", "panoptica", "numpy", "scipy")}}
    for name, prediction, truth, spacing_mm in (*synthetic_pairs(), *real_pairs(folder)):
        results = evaluator.evaluate(prediction, truth, voxelspacing=spacing_mm)
        golden[name] = {}
        for target, (group, labels) in GROUPS.items():
            masks = np.isin(prediction, labels), np.isin(truth, labels)
            result = results[group].to_dict()
            golden[name][target] = {key: round(float(result[key]), 9) for key in KEYS} | in_mm(*masks, spacing_mm)
        print(name, json.dumps(golden[name]["WT"]))
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items())
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def in_mm(predicted: np.ndarray, true: np.ndarray, spacing_mm) -> dict[str, float]:
    """HD95, and the NSD at 1 mm, of the whole masks: panoptica's functions know spacing and tolerance, its tables of
    whole masks leave them at voxels and half a voxel."""
    if not (predicted.any() and true.any()):
        return {}
    box = tuple(slice(max(0, line.min() - 1), line.max() + 2) for line in np.nonzero(predicted | true))
    masks = {"reference_arr": true[box], "prediction_arr": predicted[box], "voxelspacing": spacing_mm}
    return {"hd95_mm": round(float(Metric.HD95(**masks)), 9),
            "nsd_1mm": round(float(Metric.NSD(**masks, threshold=1.0)), 9)}  # fmt: skip


if __name__ == "__main__":
    main()
