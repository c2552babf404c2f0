#!/usr/bin/env python3
"""Inference of our Swin UNETR against MONAI's with the same weights, on the CPU in float32, in turn.

  python tests/benchmarks/swinunetr_speed.py --csv tests/benchmarks/results/swinunetr_speed.csv

MONAI runs as it comes, with its fused attention, and with channels-last memory (with and without fused attention).
Prints the median seconds of each, how much longer it takes than ours, and how far its output is from ours.
"""

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from monai.networks.nets import SwinUNETR as MonaiSwinUNETR

from models.swinunetr.network import SwinUNETR

CHANNELS_LAST = torch.channels_last_3d
TOLERANCE = 1e-4  # of the logits, which are of the order of 1


def contestants(feature_size: int) -> dict:
    """Networks by name, all with the same weights and in evaluation mode, and whether each takes channels last."""
    torch.manual_seed(0)
    ours = SwinUNETR(feature_size=feature_size).eval()
    made = {"ours": (ours, False)}
    for name, fused, channels_last in (
        ("monai", False, False),
        ("monai fused attention", True, False),
        ("monai channels last", False, True),
        ("monai fused, channels last", True, True),
    ):
        model = MonaiSwinUNETR(4, 4, feature_size=feature_size, use_flash_attention=fused).eval()
        model.load_state_dict(ours.state_dict(), strict=True)
        made[name] = (model.to(memory_format=CHANNELS_LAST) if channels_last else model, channels_last)
    return made


def measure(models: dict, image: torch.Tensor, runs: int):
    """Seconds of every run by name, the networks taking turns, and each one's largest distance from our output."""
    seconds = {name: [] for name in models}
    outputs = {}
    with torch.inference_mode():
        for run in range(runs + 1):
            for name, (model, channels_last) in models.items():
                given = image.contiguous(memory_format=CHANNELS_LAST) if channels_last else image
                start = time.perf_counter()
                outputs[name] = model(given)
                if run:  # the first is a warm-up
                    seconds[name].append(time.perf_counter() - start)
    return seconds, {name: (output - outputs["ours"]).abs().max().item() for name, output in outputs.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=96, help="side of the cube in voxels (default 96)")
    parser.add_argument("--feature-size", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each network (default 5)")
    parser.add_argument("--csv", type=Path, help="write every run here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    models = contestants(arguments.feature_size)
    image = torch.randn(1, 4, *(arguments.size,) * 3)
    seconds, distances = measure(models, image, arguments.runs)
    medians = {name: statistics.median(runs) for name, runs in seconds.items()}
    print(f"{arguments.size}^3 voxels, feature size {arguments.feature_size}, {arguments.threads} threads, float32")
    for name, median in medians.items():
        ratio, distance = median / medians["ours"], distances[name]
        print(f"{name:28} {median:7.3f} s  {ratio:5.2f} x ours  largest difference {distance:.1e}")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["network", "size", "feature_size", "threads", "run", "seconds"])
            for name, runs in seconds.items():
                for run, value in enumerate(runs):
                    setting = (arguments.size, arguments.feature_size, arguments.threads)
                    writer.writerow([name, *setting, run, f"{value:.4f}"])
    if max(distances.values()) > TOLERANCE:
        sys.exit("the outputs differ")


if __name__ == "__main__":
    main()
