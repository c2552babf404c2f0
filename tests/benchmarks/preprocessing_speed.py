#!/usr/bin/env python3
"""Preprocessing against the same steps as a MONAI Compose chain: CPU seconds of one thread, case by case in turn.

  python tests/benchmarks/preprocessing_speed.py RAW --csv tests/benchmarks/results/preprocessing_speed.csv

Both read the five files and write one; the file is removed before the next. Prints medians of the CPU seconds per case,
the ratio pair by pair, how far images and labels differ, and the peak memory of a worker. Rows are appended to the CSV.
With ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 both run as on a laptop.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from csv_rows import append_rows
from monai import transforms as mt

from models.brats import MODALITIES
from models.cases import find_cases
from models.cohort import process_case
from models.files import git_commit
from models.tensors import load_case


def monai_chain(size: int):
    keys = [*MODALITIES, "label"]

    def normalise(image):
        """Percentiles of the non-zero voxels; ScaleIntensityRangePercentiles counts the background in."""
        foreground = image != 0
        low, high = np.percentile(image[foreground].numpy(), (0.5, 99.5))  # a tenth of the time of torch.quantile
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


def processor() -> str:
    """The name of the processor and the widest instructions that torch may use on it (Linux)."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    flags = next(line for line in lines if line.startswith("flags")).split()
    widest = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    if "avx2" in (os.environ.get("ONEDNN_MAX_CPU_ISA", "").lower(), os.environ.get("ATEN_CPU_CAPABILITY", "").lower()):
        widest = ["avx2"]
    return f"{name} ({widest[-1] if widest else 'no avx2'})"


def cpu_seconds(work, *arguments) -> float:
    start = time.process_time()
    work(*arguments)
    return time.process_time() - start


def compare(case, chain, settings: dict, out: Path) -> dict:
    """One case by both, in turn: a row of the CSV."""
    ours, theirs = out / f"{case.name}.pt", out / "monai.pt"
    dtypes = (torch.float16, torch.uint8) if settings["compact"] else (torch.float32, torch.int64)
    files = {modality: case.files[modality][0] for modality in MODALITIES} | {"label": case.files["seg"][0]}

    def run_monai():
        result = chain(files)
        parts = (result[key].as_tensor().to(dtype) for key, dtype in zip(("image", "label"), dtypes, strict=True))
        torch.save(dict(zip(("image", "label"), parts, strict=True)), theirs)

    ours_s = cpu_seconds(process_case, case, out, settings)
    made = load_case(ours)
    image, label = made["image"].clone(), made["label"].clone()
    ours.unlink()
    monai_s = cpu_seconds(run_monai)
    expected = torch.load(theirs, weights_only=True)
    theirs.unlink()
    difference = (image - expected["image"].float()).abs()
    return {
        "case": case.name, "compact": settings["compact"], "ours_cpu_s": ours_s, "monai_cpu_s": monai_s,
        "monai_over_ours": monai_s / ours_s, "max_image_difference": float(difference.max()),
        "mean_image_difference": float(difference.mean()),
        "label_agreement": float((label == expected["label"]).float().mean()),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases, chain, rows = find_cases(args.raw), monai_chain(args.size), []
    with tempfile.TemporaryDirectory() as folder:
        for compact in (False, True):
            settings = {"size": args.size, "spacing_mm": 1.0, "compact": compact, "normalize": "percentile"}
            made = [compare(case, chain, settings, Path(folder)) for case in [cases[0], *cases]][1:]  # one to warm up
            print("compact" if compact else "not compact")
            for key in list(made[0])[2:]:
                values = [row[key] for row in made]
                print(f"  {key:22} median {statistics.median(values):.3g}, {min(values):.3g} to {max(values):.3g}")
            rows += made
    about = {"worker_peak_gib": peak_of_worker_gib(args.raw, args.size), "processor": processor(),
             "torch": torch.__version__, "commit": git_commit(), "date": date.today().isoformat()}  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if args.csv:
        append_rows(args.csv, [row | about for row in rows])


if __name__ == "__main__":
    main()
