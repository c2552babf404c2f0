#!/usr/bin/env python3
"""Our Swin UNETR against MONAI's with the same weights: inference and training steps, taking turns.

  python tests/benchmarks/swinunetr_speed.py --csv tests/benchmarks/results/swinunetr_speed_cpu.csv
  python tests/benchmarks/swinunetr_speed.py --device cuda --csv tests/benchmarks/results/swinunetr_speed_cuda.csv

MONAI runs as it comes, with its fused attention (which it has for inference only), with channels-last memory, and on a
CPU with freed memory kept, which is our own setting (models.device.keep_freed_memory) and helps MONAI even more: two
processes, with and without it, take turns. In bf16 every network runs under autocast and with its weights converted; a
processor that only emulates it leaves it out. Prints the median time of each, how much longer it takes than ours, and
how far its outputs (or, in training, its loss) are from ours. Rows are appended to the CSV.
"""

import argparse
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from csv_rows import append_rows
from monai.networks.nets import SwinUNETR as MonaiSwinUNETR

from models import build_model
from models.device import choose_device, device_name, keep_freed_memory, native_dtypes, synchronise
from models.files import git_commit
from models.losses import make_loss

CHANNELS_LAST = torch.channels_last_3d
TOLERANCE = {"float32": 1e-4, "bf16": 0.2}  # of logits of the order of 1
WORK = {  # device -> (mode, dtype, side of the cube in voxels, feature size)
    "cpu": (("inference", "float32", 96, 24), ("inference", "bf16", 96, 24), ("training", "float32", 64, 12)),
    "cuda": (("inference", "bf16", 128, 48), ("training", "bf16", 128, 48)),
}


NETWORKS, OPTIMIZERS = {}, {}  # of one process


def make_networks(mode: str, dtype: str, feature_size: int, device, kept: bool) -> dict:
    """(network, whether it takes channels last, whether it runs under autocast) by name; all have the same weights."""
    torch.manual_seed(0)
    state = build_model("swinunetr", feature_size=feature_size).state_dict()
    made = {}

    def add(name, network, channels_last):
        network.load_state_dict(state, strict=True)
        network = network.to(device).train(mode == "training")
        if channels_last:
            network = network.to(memory_format=CHANNELS_LAST)
        made[name] = (network, channels_last, dtype == "bf16")

    def copies(build, name, channels_last):
        add(name, build(), channels_last)
        if dtype == "bf16" and mode == "inference":
            add(f"{name}, bf16 weights", build(), channels_last)
            made[f"{name}, bf16 weights"] = (made[f"{name}, bf16 weights"][0].bfloat16(), channels_last, False)

    if kept or device.type == "cuda":
        copies(lambda: build_model("swinunetr", feature_size=feature_size), "ours", False)
    for fused in (False, True) if mode == "inference" else (False,):
        for channels_last in (False, True):
            name = "monai" + ", fused attention" * fused + ", channels last" * channels_last + ", memory kept" * kept
            copies(lambda fused=fused: MonaiSwinUNETR(4, 4, feature_size=feature_size, use_flash_attention=fused),
                   name, channels_last)  # fmt: skip
    return made


def step(network, image, label, autocast: bool, optimizer):
    """One forward pass (returns the logits), or with an optimizer one training step (returns the loss)."""
    with torch.autocast(image.device.type, torch.bfloat16, enabled=autocast):
        logits = network(image)
    if optimizer is None:
        return logits.float()
    loss = make_loss()(logits.float(), label)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def prepare(mode: str, dtype: str, feature_size: int, device, kept: bool, threads: int):
    """Make the networks of this process."""
    torch.set_num_threads(threads)
    keep_freed_memory(kept)
    NETWORKS.update(make_networks(mode, dtype, feature_size, device, kept))
    for name, (network, _, _) in NETWORKS.items():
        OPTIMIZERS[name] = torch.optim.AdamW(network.parameters(), 1e-5) if mode == "training" else None


def take_turns(mode: str, size: int, run: int, device) -> dict:
    """Seconds and result of each network of this process, on the same new image."""
    torch.manual_seed(run)
    image = torch.randn(1, 4, size, size, size).to(device)
    label = torch.randint(0, 4, (1, 1, size, size, size)).to(device)
    measured = {}
    with torch.set_grad_enabled(mode == "training"):
        for name, (network, channels_last, autocast) in NETWORKS.items():
            given = image.to(next(network.parameters()).dtype)
            given = given.contiguous(memory_format=CHANNELS_LAST) if channels_last else given
            synchronise(device)
            start = time.perf_counter()
            result = step(network, given, label, autocast, OPTIMIZERS[name])
            synchronise(device)
            measured[name] = time.perf_counter() - start, result.cpu().numpy() if run == 0 else None
    return measured


def measure(mode: str, dtype: str, size: int, feature_size: int, args, device):
    """Seconds of every run, and the first result, by name; the processes and their networks take turns."""
    seconds, first = {}, {}
    settings = (True, False) if device.type == "cpu" else (False,)  # whether a process keeps freed memory
    pools = [ProcessPoolExecutor(1, get_context("spawn")) for _ in settings]
    for pool, kept in zip(pools, settings, strict=True):
        pool.submit(prepare, mode, dtype, feature_size, device, kept, args.threads).result()
    for run in range(args.runs + 1):
        for pool in pools:
            for name, (duration, result) in pool.submit(take_turns, mode, size, run, device).result().items():
                if run:  # the first warms up
                    seconds.setdefault(name, []).append(duration)
                else:
                    first[name] = result
    for pool in pools:
        pool.shutdown()
    return seconds, first


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(WORK), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each network (default 5)")
    parser.add_argument("--csv", type=Path, help="write every run here")
    args = parser.parse_args()
    device = choose_device(args.device)
    machine = device_name(device)
    print(f"{machine}, torch {torch.__version__}, commit {git_commit()}")
    rows = []
    for mode, dtype, size, feature_size in WORK[args.device]:
        if dtype == "bf16" and torch.bfloat16 not in native_dtypes(device):
            continue
        seconds, first = measure(mode, dtype, size, feature_size, args, device)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        best = min(median for name, median in medians.items() if name.startswith("ours"))
        print(f"\n{mode}, {dtype}, {size}^3 voxels, feature size {feature_size}")
        for name, median in medians.items():
            distance = abs(first[name] - first["ours"]).max()
            print(f"{name:52} {median:7.3f} s  {median / best:5.2f} x ours  distance {distance:.1e}")
            if distance > TOLERANCE[dtype]:
                sys.exit(f"{name}: the results differ")
            rows += [
                {"device": machine, "torch": torch.__version__, "commit": git_commit(), "mode": mode, "dtype": dtype,
                 "size": size, "feature_size": feature_size, "network": name, "run": run, "seconds": f"{value:.4f}"}
                for run, value in enumerate(seconds[name])
            ]  # fmt: skip
    if args.csv:
        append_rows(args.csv, rows)


if __name__ == "__main__":
    main()
