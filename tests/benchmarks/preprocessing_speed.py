#!/usr/bin/env python3
"""Preprocessing against the same steps as a MONAI Compose chain, case by case in turn, one thread each.

  python tests/benchmarks/preprocessing_speed.py RAW --csv tests/benchmarks/results/preprocessing_speed.csv

Prints seconds per case (median), the ratio pair by pair, how far the images differ, and the peak memory of a worker.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from monai import transforms as mt

from models.brats import MODALITIES, find_cases
from models.dataset import load_case
from preprocess_brats import process_case


def monai_chain(size: int):
    keys = [*MODALITIES, "label"]

    def normalise(image):
        """Percentiles of the non-zero voxels; ScaleIntensityRangePercentiles counts the background in."""
        foreground = image != 0
        low, high = (torch.quantile(v, q) for v, q in ((image[foreground][::4], q) for q in (0.005, 0.995)))
        return ((image - low) / (high - low)).clamp(0, 1) * foreground

    return mt.Compose([
        mt.LoadImaged(keys, ensure_channel_first=True),
        mt.Orientationd(keys, axcodes="RAS", labels=None),
        mt.Spacingd(keys, pixdim=(1.0, 1.0, 1.0), mode=["bilinear"] * 4 + ["nearest"]),
        mt.Lambdad(MODALITIES, normalise),
        mt.ConcatItemsd(MODALITIES, "image"),
        mt.CropForegroundd(["image", "label"], source_key="image", select_fn=lambda x: x != 0, allow_smaller=True),
        mt.Resized(["image", "label"], (size,) * 3, mode=["trilinear", "nearest-exact"]),
        mt.Lambdad("label", lambda label: torch.where(label == 4, 3, label).long()),
    ])  # fmt: skip


# A process starts with the peak of the one that started it, so a small one has to start the script.
LARGEST_CHILD = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_of_worker_gib(raw: Path, size: int) -> float:
    """The largest process that preprocess_brats.py starts, from the system's own accounting (Linux: KiB)."""
    with tempfile.TemporaryDirectory() as out:
        script = Path(__file__).parents[2] / "preprocess_brats.py"
        command = [sys.executable, script, raw, out, "--size", str(size), "--workers", "1", "--limit", "4"]
        measured = [sys.executable, "-c", LARGEST_CHILD, *map(str, command)]
        return int(subprocess.run(measured, check=True, capture_output=True, text=True).stdout) / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = find_cases(args.raw)
    chain, settings = monai_chain(args.size), {"size": args.size, "spacing_mm": 1.0, "compact": False}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for case in [cases[0], *cases]:  # the first time warms up
            start = time.perf_counter()
            process_case(case, case.layout, out, settings)
            ours = time.perf_counter() - start
            files = {modality: case.files[modality][0] for modality in MODALITIES} | {"label": case.files["seg"][0]}
            start = time.perf_counter()
            result = chain(files)
            torch.save({"image": result["image"].as_tensor(), "label": result["label"].as_tensor()}, out / "monai.pt")
            theirs = time.perf_counter() - start
            made = load_case(out / f"{case.name}.pt")
            rows.append({
                "case": case.name, "ours_s": ours, "monai_s": theirs, "monai_over_ours": theirs / ours,
                "mean_image_difference": float((made["image"] - result["image"].as_tensor()).abs().mean()),
                "label_agreement": float((made["label"] == result["label"].as_tensor()).float().mean()),
            })  # fmt: skip
        del rows[0]
    peak_gib = peak_of_worker_gib(args.raw, args.size)
    for key in list(rows[0])[1:]:
        print(f"{key:24} median {statistics.median(row[key] for row in rows):.4f}")
    print(f"peak memory of a worker {peak_gib:.2f} GiB")
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], "worker_peak_gib"], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**{k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()},
                              "worker_peak_gib": f"{peak_gib:.3g}"} for row in rows)  # fmt: skip


if __name__ == "__main__":
    main()
