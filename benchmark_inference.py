#!/usr/bin/env python3
"""Measure how fast, how large and how exact the networks run, engine by engine.

A row is a network, an engine, a number type, a batch and a size, in a process of its own. MONAI's classes run beside
ours with the same weights. Engines: eager, fused, compile, cudagraph, aot, onnx, openvino. Types: float32, tf32, bf16,
fp16, int8. What this machine cannot run is listed with the reason, and so is a type that it only emulates, which runs
if --dtypes names it. int8 also runs only if it is named, with openvino, and for a --run whose training cases exist:
they calibrate it. --out gets figures and a CSV named after device and torch, to which every run appends; the last line
on stdout is one JSON object.

  python benchmark_inference.py --case data/BraTS2021_Training_Data/BraTS2021_00000 --profile   (one GPU)
  python benchmark_inference.py --size 64 96 128 --batch-sizes 1 2 4 --engines fused cudagraph  (memory and throughput)
  python benchmark_inference.py --size 64 --feature-size 12 --engines eager fused               (a minute on a CPU)
  python benchmark_inference.py --run RUN --engines openvino --dtypes float32 int8
"""

import json
import sys
from pathlib import Path

from models import cli
from models.brats import LABEL_SCHEMES
from models.files import ROOT, make_writable

RESULTS = ROOT / "models/benchmark/results"


def arguments():
    parser = cli.parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=("unet", "swinunetr", "monai-unet", "monai-swinunetr"),
                        help="networks with random weights (default: all, or none if there is a --run)")
    parser.add_argument("--run", nargs="+", type=Path, default=[], dest="runs", metavar="RUN",
                        help="trained runs, or .pt2 files of the aot engine")
    parser.add_argument("--size", nargs="+", type=cli.positive_int, help="sides of the cube (default: 128; CPU: 96)")
    parser.add_argument("--batch-sizes", nargs="+", type=cli.positive_int, default=[1], help="volumes per pass")
    parser.add_argument("--feature-size", type=cli.positive_int, help="of Swin UNETR (default: 48; on a CPU 24)")
    parser.add_argument("--engines", nargs="+", help="default: all")
    parser.add_argument("--dtypes", nargs="+", help="number types (default: all that the device multiplies)")
    parser.add_argument("--layout", choices=("auto", "contiguous", "channels-last-3d"), default="auto",
                        help="of memory; auto: measured, the faster one")
    parser.add_argument("--repeats", type=cli.positive_int, default=30, help="timed passes of a row")
    parser.add_argument("--max-seconds", type=cli.positive_float, default=10,
                        help="a row's time for its passes: when it is over there are fewer, but 5 at least")
    parser.add_argument("--case", type=Path, help="a raw case: time the way from its files to a label map on disk too")
    parser.add_argument("--labels", choices=LABEL_SCHEMES,
                        help="what the label values of that case mean, if its file names do not say")
    parser.add_argument("--profile", action="store_true", help="where the time goes, before and after: tables, traces")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV and the figures")
    parser.add_argument("--cache", type=Path, default=Path(".engines"), help="folder of compiled engines")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    from tqdm import tqdm

    from models.benchmark import table
    from models.benchmark.figures import draw
    from models.benchmark.jobs import choose_models, make_jobs, profile_networks
    from models.benchmark.worker import measure, measure_speed
    from models.cases import find_cases, scheme_of
    from models.device import choose_device

    device = choose_device(args.device)
    if args.case:
        scheme_of(find_cases(args.case, args.labels)[0])
    setting = {"engines": args.engines, "sizes": args.size or [128 if device.type == "cuda" else 96],
               "batch_sizes": args.batch_sizes, "device": device.type}  # fmt: skip
    feature_size = args.feature_size or (48 if device.type == "cuda" else 24)
    models = choose_models(args.models, args.runs, feature_size=feature_size, **setting)
    jobs = make_jobs(models, dtypes=args.dtypes, **setting, layout=args.layout, repeats=args.repeats,
                     max_seconds=args.max_seconds, cache=str(args.cache), case=str(args.case) if args.case else None,
                     labels=args.labels)  # fmt: skip
    make_writable(args.out)
    dtypes = sorted({job.dtype for job in jobs if not job.not_run})
    print(f"Measuring matrix products in {', '.join(dtypes)}, and copies ...", file=sys.stderr)
    speed = measure_speed(device.type, dtypes)
    circumstances = table.describe_run(device)
    path = table.table_path(args.out, circumstances)
    earlier, rows = table.read_table(path), []
    for job in (progress := tqdm(jobs, unit="row")):
        progress.set_description(f"{job.model.name}, {job.engine}, {job.dtype}, {job.size}³")
        rows = table.with_ratios([*rows, table.make_row(job, measure(job), speed, circumstances)])
        table.write_table(path, earlier + rows)  # after every row: an interrupted run keeps what it has
    table.print_table(rows, speed)
    stem = path.with_suffix("")
    profile = stem.with_name(f"{stem.name}-profile.csv")
    spent_ms = profile_networks(jobs, rows, profile) if args.profile else {}
    written = [path, *draw(rows, table.latest_of_each_setting(earlier + rows), spent_ms, stem)]
    written += [profile] if spent_ms else []
    print(f"Written to {args.out}: {', '.join(path.name for path in written)}")
    print(json.dumps(table.summarise(rows, speed, path)))
    return 3 if any(row.status.startswith(("failed", "out of memory")) for row in rows) else 0


if __name__ == "__main__":
    cli.run(main)
