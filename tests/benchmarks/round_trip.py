#!/usr/bin/env python3
"""What resizing costs: Dice of a label map taken to network space and back, the ceiling of any prediction there.

  python tests/benchmarks/round_trip.py RAW --csv tests/benchmarks/results/round_trip.csv
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from models.cases import find_cases, scheme_of
from models.files import write_csv
from models.labels import to_training_labels
from models.metrics import confusion, dice_per_target
from models.preprocessing import to_native, to_network
from models.volumes import read_case


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 96, 64])
    parser.add_argument("--csv", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for case in find_cases(args.raw):
        volumes = read_case(case)
        label = to_training_labels(volumes.label, scheme_of(case))
        for size in args.sizes:
            result = to_network(volumes.image, label, volumes.affine, size)
            back = to_native(result["label"][0], result["geometry"])
            dice = dice_per_target(confusion(back, torch.from_numpy(label)))
            rows.append({"case": case.name, "size": size, **{target: f"{dice[target]:.4f}" for target in dice}})
    for size in args.sizes:
        chosen = [row for row in rows if row["size"] == size]
        print(size, {target: min(row[target] for row in chosen) for target in list(rows[0])[2:]}, "lowest Dice")
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    write_csv(args.csv, rows)


if __name__ == "__main__":
    main()
