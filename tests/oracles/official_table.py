#!/usr/bin/env python3
"""Compare per_case.csv with the table of BraTS 2026's official program, which reads the predictions as we write them.

  python evaluate.py RUN --cases RAW --save-nifti PREDICTIONS --label-values brats2023 --out OUT
  python tests/oracles/official_table.py RAW PREDICTIONS OUT/per_case.csv --program VENV/bin/brats-evaluate

VENV is the environment that brats_2026.py describes. The truth of BraTS up to 2021 has the value 4 for ET where the
program wants 3, so it is written anew. The program finds cases by the number in their names (00000, 00000-000): names
without one, such as those of BraTS 2018, get one here, in links. It exits with 1 where a value differs by more than
1e-6, or by more than the six digits of the CSV.
"""

import argparse
import csv
import json
import re
import subprocess
import sys
import tempfile
from math import isclose, isfinite
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from models.cases import find_cases, scheme_of  # noqa: E402
from models.labels import to_raw_labels, to_training_labels  # noqa: E402
from models.nifti import read_label, write_label_nifti  # noqa: E402

GROUPS = {"WT": "wt", "TC": "tc", "ET": "et", "NCR": "netc", "ED": "snfh"}
COLUMNS = {  # ours -> theirs; at 1 mm their voxels are our millimetres
    "dice": "global_bin_dsc", "nsd_0mm": "global_bin_nsd", "hd95_mm": "global_bin_hd95", "lesion2026_dice": "sq_dsc",
    "lesion2026_nsd": "sq_nsd", "lesion2026_hd95_mm": "sq_hd95", "lesion2026_tp": "tp", "lesion2026_fp": "fp",
    "lesion2026_fn": "fn",
}  # fmt: skip
SUBJECT = re.compile(r"\d{5}(-\d{3})?|\d{4}-\d{1,3}")  # what the program takes for the number of a case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path)
    parser.add_argument("predictions", type=Path)
    parser.add_argument("table", type=Path, help="per_case.csv of one run in native space")
    parser.add_argument("--program", default="brats-evaluate")
    args = parser.parse_args()
    with args.table.open(newline="") as file:
        ours = {(row["case"], row["target"]): row for row in csv.DictReader(file)}
    with tempfile.TemporaryDirectory() as folder:
        names = lay_out(args.raw, args.predictions, {case for case, _ in ours}, Path(folder))
        theirs = official(args.program, Path(folder))
    compared, undefined, different = 0, 0, []
    for name, case in names.items():
        for target, group in GROUPS.items():
            for column, key in COLUMNS.items():
                value, official_value = float(ours[case, target][column]), theirs[name][group].get(key)
                if official_value is None or not isfinite(official_value):
                    undefined += 1  # empty masks: the rules that metrics.py and lesions.py state
                elif isclose(value, official_value, rel_tol=5e-6, abs_tol=1e-6):
                    compared += 1
                else:
                    different.append(f"{case} {target} {column}: {value} here, {official_value} there")
    print(f"{len(names)} cases: {compared} values equal, {undefined} left undefined by {args.program}, "
          f"{len(different)} different.", *different, sep="\n")
    return 1 if different else 0


def lay_out(raw: Path, predictions: Path, cases: set[str], folder: Path) -> dict[str, str]:
    """The truth and the predictions in folder/ref and folder/pred; returns the name of a truth's file -> case."""
    names = {}
    (folder / "ref").mkdir()
    (folder / "pred").mkdir()
    for number, case in enumerate(case for case in find_cases(raw) if case.name in cases):
        name = case.name if SUBJECT.search(case.name) else f"{number:05}"
        label, affine = read_label(case.files["seg"][0])
        truth = to_raw_labels(to_training_labels(label, scheme_of(case)), "brats2023")
        write_label_nifti(folder / f"ref/{name}.nii.gz", truth, affine)
        (folder / f"pred/{name}.nii.gz").symlink_to((predictions / f"{case.name}.nii.gz").resolve())
        names[f"{name}.nii.gz"] = case.name
    return names


def official(program: str, folder: Path) -> dict[str, dict]:
    """The program's table: name of a truth's file -> group -> values."""
    summary = folder / "summary.json"
    command = [program, "--ref_path", folder / "ref", "--pred_path", folder / "pred", "--config", "gli",
               "--summary_json", summary]  # fmt: skip
    subprocess.run(command, check=True, stdout=sys.stderr)
    table = json.loads(summary.read_text())
    assert not table["missings"], table["missings"]
    return {subject["subject_name"]: subject for subject in table["metrics"]}


if __name__ == "__main__":
    sys.exit(main())
