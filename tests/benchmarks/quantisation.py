#!/usr/bin/env python3
"""OpenVINO in int8 against float32 and, where the processor multiplies it, bf16: what the labels lose and what time is
won on the cases of a run, the types taking turns case by case.

  python tests/benchmarks/quantisation.py models/unet/results/RUN --csv tests/benchmarks/results/int8.csv

A row for each type and part of the split: the share of labels that are those of float32, also of the voxels that either
takes for tumour; the Dice of the regions against the truth, means over the cases; the median time of a pass, over all
parts. int8 is calibrated with training cases, so only those of the other parts are new to it. Rows are appended to the
CSV. ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 comes close to a processor that has AVX2 alone.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from csv_rows import append_rows

from models.brats import REGIONS
from models.device import DTYPES, choose_device, device_name, native_dtypes
from models.files import git_commit
from models.inference.engines import load_engine
from models.inference.quantisation import calibration_images, label_counts
from models.losses import labels_from_logits
from models.metrics import confusion, dice_per_target
from models.runs import Run, load_model, open_run
from models.tensors import load_case

CPU = choose_device("cpu")


def compare(engines: dict, paths: list[Path], turns: int) -> dict[str, dict]:
    """For each type what its labels are worth, means over these cases, and the list of its times in ms."""
    rows = {dtype: {"agreement": [], "tumour": [], "ms": [], **{region: [] for region in REGIONS}} for dtype in engines}
    for path in paths:
        case, labels = load_case(path), {}
        image, truth = case["image"][None].clone(), case["label"][0]
        for turn in range(turns + 1):  # the first warms up
            for dtype, engine in engines.items():
                start = time.perf_counter()
                logits = engine(image)
                if turn:
                    rows[dtype]["ms"].append(1e3 * (time.perf_counter() - start))
                labels[dtype] = labels_from_logits(logits)[0]
        for dtype, label in labels.items():
            same, voxels, same_in_tumour, in_tumour = label_counts(label, labels["float32"]).tolist()
            rows[dtype]["agreement"].append(same / voxels)
            rows[dtype]["tumour"].append(same_in_tumour / max(in_tumour, 1))
            dice = dice_per_target(confusion(label, truth))
            for region in REGIONS:
                rows[dtype][region].append(dice[region])
    return rows


def measure(run: Run, turns: int) -> list[dict]:
    types = [name for name in ("float32", "bf16") if DTYPES[name] in native_dtypes(CPU)] + ["int8"]
    network, calibration, shape = load_model(run.checkpoint)[0], calibration_images(run), (1, 4, *run.size)
    setting = {"shape": shape, "fallback": False, "calibration": calibration}
    engines = {dtype: load_engine(network, "openvino", dtype, **setting) for dtype in types}
    parts = {part: [run.data / f"{name}.pt" for name in names] for part, names in run.split.items() if names}
    compared = {part: compare(engines, paths, turns) for part, paths in parts.items()}
    medians = {dtype: median(ms for rows in compared.values() for ms in rows[dtype]["ms"]) for dtype in types}
    return [
        {"network": run.network, "run": run.name, "side": run.size[0], "dtype": dtype, "part": part,
         "cases": len(parts[part]), "label_agreement": fmean(found["agreement"]),
         "lowest_label_agreement": min(found["agreement"]), "tumour_agreement": fmean(found["tumour"]),
         **{f"dice_{region}": fmean(found[region]) for region in REGIONS},
         "median_ms": medians[dtype], "times_faster": medians["float32"] / medians[dtype]}
        for part, rows in compared.items() for dtype, found in rows.items()
    ]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--data", type=Path, help="its preprocessed cases (default: where they were in its training)")
    parser.add_argument("--turns", type=int, default=3, help="passes of each type over each case that count")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    common = {"date": time.strftime("%Y-%m-%d"), "commit": git_commit(), "device": device_name(CPU),
              "torch": torch.__version__}  # fmt: skip
    for path in args.runs:
        run = open_run(path)
        rows = [common | row for row in measure(replace(run, data=args.data or run.data), args.turns)]
        for row in rows:
            print("{network} {side} {dtype:7} {part:10} {cases} cases: labels {label_agreement:.2%} (lowest "
                  "{lowest_label_agreement:.2%}), in the tumour {tumour_agreement:.2%}, Dice WT {dice_WT:.4f} TC "
                  "{dice_TC:.4f} ET {dice_ET:.4f}, {median_ms:.1f} ms, {times_faster:.2f} times faster".format_map(row))
        if args.csv:
            append_rows(args.csv, rows)


if __name__ == "__main__":
    main()
