#!/usr/bin/env python3
"""What oneDNN in place of torch's fallback brings for small volumes (models/onednn.py): the same network with torch's
own convolutions and with ours, taking turns, float32.

  python tests/benchmarks/small_convolutions.py --csv tests/benchmarks/results/small_convolutions.csv

On a processor with AVX-512, ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 comes close to one that has AVX2 alone.
Rows are appended to the CSV.
"""

import argparse
import sys
import time
from copy import deepcopy
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from csv_rows import append_rows
from torch import nn

from models import build_model, onednn
from models.device import choose_device, device_name
from models.files import git_commit
from models.losses import make_loss

CPU = choose_device("cpu")
# network, its settings, pass, side in voxels, batch
MEASURED = (
    *(("unet", {}, "training step", side, batch) for side, batch in ((64, 1), (64, 2), (96, 1), (128, 1))),
    *(("unet", {}, "inference", side, 1) for side in (64, 96, 128)),
    ("swinunetr", {"feature_size": 12}, "training step", 64, 1),
    ("swinunetr", {"feature_size": 12}, "inference", 64, 1),
    ("swinunetr", {"feature_size": 24}, "inference", 96, 1),
)


def with_torchs_convolutions(model: nn.Module) -> nn.Module:
    model = deepcopy(model)
    for module in model.modules():
        if isinstance(module, onednn.Conv3d | onednn.ConvTranspose3d):
            module.__class__ = getattr(nn, type(module).__name__)
    return model


def make_pass(model: nn.Module, kind: str, side: int, batch: int):
    torch.manual_seed(0)
    image, label = torch.rand(batch, 4, side, side, side), torch.randint(4, (batch, 1, side, side, side))
    if kind == "inference":
        return torch.inference_mode()(lambda: model.eval()(image))
    optimizer, loss = torch.optim.AdamW(model.train().parameters(), 1e-3, fused=True), make_loss()

    def step():
        loss(model(image), label).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(network: str, settings: dict, kind: str, side: int, batch: int, runs: int) -> dict:
    torch.manual_seed(0)
    ours = build_model(network, **settings)
    passes = {"torch": make_pass(with_torchs_convolutions(ours), kind, side, batch),
              "ours": make_pass(ours, kind, side, batch)}  # fmt: skip
    seconds = {name: [] for name in passes}
    for _ in range(runs + 1):  # the first of each warms up
        for name, run in passes.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: median(times[1:]) for name, times in seconds.items()}
    described = " ".join([network, *(f"{key}={value}" for key, value in settings.items())])
    return {"network": described, "pass": kind, "side": side, "batch": batch, "torch_s": medians["torch"],
            "ours_s": medians["ours"], "ours_s_per_volume": medians["ours"] / batch,
            "times_faster": medians["torch"] / medians["ours"]}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    common = {"date": time.strftime("%Y-%m-%d"), "commit": git_commit(), "device": device_name(CPU),
              "torch": torch.__version__}  # fmt: skip
    rows = []
    for measured in MEASURED:
        rows.append(common | measure(*measured, args.runs))
        print("{network:26} {pass:13} {side:4} batch {batch}: {torch_s:.3f} s -> {ours_s:.3f} s, {times_faster:.2f} "
              "times faster".format_map(rows[-1]))  # fmt: skip
    if args.csv:
        append_rows(args.csv, rows)


if __name__ == "__main__":
    main()
