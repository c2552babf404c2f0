#!/usr/bin/env python3
"""How long trainings on all of BraTS 2021 would take on GPUs that are not here, computed; and, to check the formula,
what it says of steps on this machine, measured beside it.

  python tests/benchmarks/scaling.py --csv tests/benchmarks/results/scaling.csv

An operation takes as long as its arithmetic or its traffic to memory, whichever is longer, and the time to launch it:

  step = sum over operations of max(FLOP / (0.4 peak), bytes / (0.75 bandwidth)) + 4 us        (launches: on a GPU)
  training = epochs x (training cases + validation cases / 3) x step / (0.9 GPUs)              (0.9: of one GPU only, 1)

Every operation is taken to read its inputs from memory and to write its result there: no fusion. The shares are what
convolution networks usually reach; data loading hides behind the steps. Peaks (dense bf16 or fp16 with float32 sums)
and bandwidths are those of the makers' data sheets; those of a processor here are measured, by a matrix product and a
copy, and so is the step.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from csv_rows import append_rows

from models import build_model
from models.amp import step_seconds
from models.benchmark.profiling import copy_bandwidth_gb_s, matrix_peak_tflops
from models.cost import training_peak_gib, training_work
from models.device import AMP_DTYPES, choose_device, device_name, resolve_amp
from models.files import git_commit

GPUS = {  # TFLOP/s, GB/s, GiB, how many
    "GeForce RTX 3070 (8 GB)": (40.6, 448, 8, 1),
    "A100 80 GB": (312, 2039, 80, 1),
    "H100 SXM": (989, 3350, 80, 1),
    "8 x H100 SXM": (989, 3350, 80, 8),
}
TRAININGS = {"unet": ({}, 200), "swinunetr": ({"feature_size": 48}, 300)}  # settings, epochs
CASES, FOLDS, SIDE = 1251, 5, 128
PEAK_SHARE, BANDWIDTH_SHARE, LAUNCH_S, GPUS_SHARE = 0.4, 0.75, 4e-6, 0.9


def step_s(work: list[tuple[int, int]], tflops: float, gb_per_s: float, launch_s=LAUNCH_S) -> float:
    flop_s, bytes_s = PEAK_SHARE * tflops * 1e12, BANDWIDTH_SHARE * gb_per_s * 1e9
    return sum(max(flop / flop_s, moved / bytes_s) + launch_s for flop, moved in work)


def training_hours(step: float, epochs: int, gpus: int = 1) -> float:
    """Of one fold of five."""
    validated = CASES / FOLDS
    share = GPUS_SHARE if gpus > 1 else 1.0
    return epochs * (CASES - validated + validated / 3) * step / (share * gpus) / 3600


def gpu_rows() -> list[dict]:
    rows = []
    for network, (config, epochs) in TRAININGS.items():
        work = training_work(build_model(network, **config), (1, 4, SIDE, SIDE, SIDE), torch.bfloat16)
        needed_gib = training_peak_gib(build_model(network, **config), (1, 4, SIDE, SIDE, SIDE), torch.bfloat16)
        for gpu, (tflops, gb_per_s, gib, count) in GPUS.items():
            seconds = step_s(work, tflops, gb_per_s)
            hours = training_hours(seconds, epochs, count)
            rows.append({"network": network, "device": gpu, "side": SIDE, "epochs": epochs, "tflops": tflops,
                         "gb_per_s": gb_per_s, "computed_step_ms": 1e3 * seconds, "measured_step_ms": "",
                         "hours_a_fold": hours, "hours_five_folds": FOLDS * hours, "needed_gib": needed_gib,
                         "memory_gib": gib})  # fmt: skip
    return rows


def measured_rows(device: torch.device) -> list[dict]:
    """Steps of both networks at sizes that a processor does in seconds, computed from its own peaks and measured."""
    amp = resolve_amp("auto", device)
    tflops = matrix_peak_tflops("bf16" if amp == "bf16" else "float32", device)
    gb_per_s = copy_bandwidth_gb_s(device)
    rows = []
    for network, config, side in (("unet", {}, 96), ("swinunetr", {"feature_size": 24}, 64)):
        model = build_model(network, **config)
        work = training_work(model, (1, 4, side, side, side), AMP_DTYPES[amp])
        measured = step_seconds(model, 1, [side] * 3, device, (amp,))[amp]
        rows.append({"network": network, "device": f"{device_name(device)}, {amp}", "side": side, "epochs": "",
                     "tflops": tflops, "gb_per_s": gb_per_s,
                     "computed_step_ms": 1e3 * step_s(work, tflops, gb_per_s, launch_s=0),
                     "measured_step_ms": 1e3 * measured, "hours_a_fold": "", "hours_five_folds": "", "needed_gib": "",
                     "memory_gib": ""})  # fmt: skip
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    rows = gpu_rows() + measured_rows(choose_device("cpu"))
    for row in rows:
        row |= {"commit": git_commit(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
        hours = (
            row["hours_a_fold"] and f"{row['hours_a_fold']:8.2f} h a fold, {row['hours_five_folds']:8.2f} h all five"
        )
        print(
            f"{row['network']:10} {row['side']}^3 {row['device']:45} computed {row['computed_step_ms']:8.1f} ms  "
            + (hours or f"measured {row['measured_step_ms']:8.1f} ms")
        )
    if args.csv:
        append_rows(args.csv, rows)


if __name__ == "__main__":
    main()
