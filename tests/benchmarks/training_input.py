#!/usr/bin/env python3
"""A cached case to a training batch: our augmentation against MONAI's dictionary transforms, in turns in one process.

  python tests/benchmarks/training_input.py --csv tests/benchmarks/results/training_input.csv

Both flip each axis and turn with probability 0.5; "noise" adds Gaussian noise to every case; "strong" adds to that what
--augmentation strong does, with its probabilities: scale, rotation, elastic deformation, bias field, blur, low
resolution, brightness, contrast and gamma. They start from the same cached case, float32 and int64 or compact (float16
and uint8, which MONAI converts after its flips, when that is cheapest), and end with the batch of one that the network
takes, float32 and int64. The tumour fills a box of half the sides, 12.5 % of the volume; in twelve patients it was 15 %
in the mean. Freed memory is kept, as in a training. The times are means over the cases: of the clock, and of the
processor, which other programs disturb less. Rows are added to the CSV.
"""

import argparse
import sys
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from csv_rows import append_rows
from monai import transforms as mt
from monai.data.utils import list_data_collate

from models import augment_strong as strong
from models.augment import augment
from models.cli import usable_cpus
from models.device import device_name, keep_freed_memory
from models.files import git_commit

KEYS = ("image", "label")
WORKS = {  # work: probability of noise, whether what is strong comes after it
    "flips, turns": (0.0, False),
    "flips, turns, noise": (1.0, False),
    "flips, turns, noise, strong": (1.0, True),
}
STORED = {"float32 + int64": (torch.float32, torch.int64), "float16 + uint8": (torch.float16, torch.uint8)}


def monai_chain(noise_probability: float, is_strong: bool) -> mt.Compose:
    """MONAI keeps int64 labels where we keep uint8: what it has to convert, it converts after the flips."""
    chain = [mt.RandFlipd(KEYS, prob=0.5, spatial_axis=axis) for axis in range(3)]
    chain += [mt.RandRotate90d(KEYS, prob=0.5, max_k=3), mt.CastToTyped(KEYS, (torch.float32, torch.int64))]
    chain += monai_strong() if is_strong else []
    if noise_probability:
        chain += [mt.RandGaussianNoised("image", prob=noise_probability, std=0.1, sample_std=False)]
    return mt.Compose(chain).set_random_state(0)


def monai_strong() -> list:
    """The nearest that MONAI has to models/augment_strong.py, in its ranges and with its probabilities."""
    happens, resampled = strong.PROBABILITIES, {"mode": ("bilinear", "nearest"), "padding_mode": "zeros"}
    low, high = strong.SCALE
    scaled_or_rotated = 1 - (1 - happens["scale"]) * (1 - happens["rotation"])
    return [
        mt.RandAffined(KEYS, prob=scaled_or_rotated, rotate_range=(strong.ANGLE,) * 3,
                       scale_range=((low - 1, high - 1),) * 3, **resampled),
        mt.Rand3DElasticd(KEYS, (5, 8), (50, 150), prob=happens["elastic"], **resampled),
        mt.RandBiasFieldd("image", prob=happens["bias"], coeff_range=strong.BIAS),
        mt.RandGaussianSmoothd("image", *(strong.BLUR_SD,) * 3, prob=happens["blur"]),
        mt.RandSimulateLowResolutiond("image", prob=happens["resolution"], zoom_range=strong.RESOLUTION),
        mt.RandStdShiftIntensityd("image", 0.5, prob=happens["contrast"], nonzero=True),
        mt.RandScaleIntensityd("image", 0.35, prob=happens["contrast"]),
        mt.RandAdjustContrastd("image", prob=happens["gamma"], gamma=strong.GAMMA),
    ]  # fmt: skip


def measure(stored: str, work: str, size: int, cases: int) -> dict[str, list[float]]:
    """Mean ms per case, by the clock and by the processor, of "ours" and of "monai"."""
    image_type, label_type = STORED[stored]
    noise_probability, is_strong = WORKS[work]
    image, label = torch.rand(4, size, size, size), torch.zeros(1, size, size, size, dtype=torch.int64)
    tumour = (0, *(slice(size // 8, size // 8 + size // 2),) * 3)
    label[tumour] = torch.randint(4, (size // 2,) * 3)
    case = {"image": image.to(image_type), "label": label.to(label_type)}
    kept = [case["image"]], [label.to(torch.uint8)]
    chain, generator, batch = monai_chain(noise_probability, is_strong), torch.Generator().manual_seed(0), None
    spent = {"ours": [0.0, 0.0], "monai": [0.0, 0.0]}
    for index in range(-2, cases):  # the first two warm up
        for name, sums in spent.items():
            start = time.perf_counter(), time.process_time()
            if name == "ours":
                batch = augment(*kept, generator, noise_probability=noise_probability, strong=is_strong, out=batch)
            else:
                list_data_collate([chain(dict(case))])
            if index >= 0:
                sums[0] += 1e3 * (time.perf_counter() - start[0]) / cases
                sums[1] += 1e3 * (time.process_time() - start[1]) / cases
    return spent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, usable_cpus()])
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    keep_freed_memory()
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for stored in STORED:
            for work in args.works:
                spent = measure(stored, work, args.size, args.cases)
                (ours_ms, ours_cpu_ms), (monai_ms, monai_cpu_ms) = spent["ours"], spent["monai"]
                rows.append({
                    "device": device_name(torch.device("cpu")), "commit": git_commit(), "date": date.today(),
                    "torch": torch.__version__, "size": args.size, "stored": stored,
                    "work": work, "ours_ms": f"{ours_ms:.1f}",
                    "monai_ms": f"{monai_ms:.1f}", "monai_over_ours": f"{monai_ms / ours_ms:.2f}",
                    "ours_cpu_ms": f"{ours_cpu_ms:.1f}", "monai_cpu_ms": f"{monai_cpu_ms:.1f}",
                    "monai_over_ours_cpu": f"{monai_cpu_ms / ours_cpu_ms:.2f}",
                })  # fmt: skip
                print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if args.csv:
        append_rows(args.csv, rows)


if __name__ == "__main__":
    main()
