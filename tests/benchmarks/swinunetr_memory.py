#!/usr/bin/env python3
"""Peak memory of a training step: side of the cube x feature size x precision x checkpointing, ours and MONAI's.

  python tests/benchmarks/swinunetr_memory.py --csv tests/benchmarks/results/swinunetr_memory.csv
  python tests/benchmarks/swinunetr_memory.py --measure      (on a CUDA device: measured beside counted)

Counted: the tensors of two steps with AdamW and our loss, batch 1, followed on the meta device through forward,
backward and update (models/cost.py), as a CUDA device would hold them; without what kernels use inside. Prints GiB.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from monai.networks.nets import SwinUNETR as MonaiSwinUNETR

from models import build_model
from models.cost import GIB, training_peak_gib
from models.files import git_commit, write_csv
from models.losses import make_loss

NETWORKS = {
    "ours": lambda feature_size: build_model("swinunetr", feature_size=feature_size),
    "ours, blocks": lambda feature_size: build_model("swinunetr", feature_size=feature_size, checkpointing="blocks"),
    "ours, full": lambda feature_size: build_model("swinunetr", feature_size=feature_size, checkpointing="full"),
    "monai": lambda feature_size: MonaiSwinUNETR(4, 4, feature_size=feature_size),
    "monai, use_checkpoint": lambda feature_size: MonaiSwinUNETR(4, 4, feature_size=feature_size, use_checkpoint=True),
}


def measured_peak_gib(model, size: int, amp_dtype) -> float:
    """What the CUDA allocator handed out at most in two training steps."""
    model = model.cuda().train()
    optimizer = torch.optim.AdamW(model.parameters())
    image = torch.randn(1, 4, size, size, size, device="cuda")
    label = torch.randint(0, 4, (1, 1, size, size, size), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    try:
        for _ in range(2):
            with torch.autocast("cuda", amp_dtype, enabled=amp_dtype is not None):
                logits = model(image)
            make_loss()(logits.float(), label).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    except torch.cuda.OutOfMemoryError:
        return float("nan")
    return torch.cuda.max_memory_allocated() / GIB


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128])
    parser.add_argument("--feature-sizes", type=int, nargs="+", default=[12, 24, 48])
    parser.add_argument("--measure", action="store_true", help="run the steps on the CUDA device as well")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    rows = []
    print(f"{'size':>4} {'feature size':>12} {'precision':>9}  " + "  ".join(f"{name:>21}" for name in NETWORKS))
    for size in args.sizes:
        for feature_size in args.feature_sizes:
            for precision, dtype in (("bf16", torch.bfloat16), ("float32", None)):
                row = {"size": size, "feature_size": feature_size, "precision": precision}
                cells = []
                for name, build in NETWORKS.items():
                    model = build(feature_size)
                    row[f"{name} (counted GiB)"] = training_peak_gib(model, (1, 4, size, size, size), dtype)
                    cells.append(f"{row[f'{name} (counted GiB)']:.2f}")
                    if args.measure:
                        row[f"{name} (measured GiB)"] = measured_peak_gib(model, size, dtype)
                        cells[-1] += f" ({row[f'{name} (measured GiB)']:.2f} measured)"
                rows.append(row)
                print(f"{size:4} {feature_size:12} {precision:>9}  " + "  ".join(f"{cell:>21}" for cell in cells))
    if args.csv:
        device = torch.cuda.get_device_name() if args.measure else "meta"
        extra = {"device": device, "torch": torch.__version__, "commit": git_commit()}
        write_csv(args.csv, [row | extra for row in rows])


if __name__ == "__main__":
    main()
