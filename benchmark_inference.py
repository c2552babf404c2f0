#!/usr/bin/env python3
"""Measure how fast, how large and how exact the networks run, engine by engine.

A row is a network, an engine, a number type, a batch and a size, in a process of its own. MONAI's classes run beside
ours with the same weights. Engines: eager, fused, compile, cudagraph, aot, onnx, openvino. Types: float32, tf32, bf16,
fp16. What this machine cannot run is listed with the reason, and so is a type that it only emulates, which runs if
--dtypes names it. --out gets figures and a CSV named after device and torch, to which every run appends; the last line
on stdout is one JSON object.

  python benchmark_inference.py --case data/BraTS2021_Training_Data/BraTS2021_00000 --profile   (one GPU)
  python benchmark_inference.py --size 64 96 128 --batch-sizes 1 2 4 --engines fused cudagraph  (memory and throughput)
  python benchmark_inference.py --size 64 --feature-size 12 --engines eager fused               (a minute on a CPU)
"""

import csv
import json
import re
import sys
import time
from itertools import product
from pathlib import Path

from models import cli

MONAI_ENGINES = ("eager", "fused", "compile")
STAGES = ("load", "preprocess", "forward", "postprocess", "write")
COLUMNS = (
    "date", "commit", "device", "torch", "model", "network", "engine", "dtype", "layout", "kernels", "batch", "size",
    "status", "p50_ms", "p90_ms", "p99_ms", "mean_ms", "sd_ms", "repeats", "volumes_per_s",
    "times_faster_than_monai_eager", "peak_gib", "parameters", "gmac_per_volume", "matrix_peak_tflops",
    "matrix_peak_share", "bandwidth_gb_s", "floor_ms", "first_use_s", "max_logit_difference", "label_agreement", "dice",
    *(f"{stage}_ms" for stage in STAGES), "command",
)  # fmt: skip


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
    parser.add_argument("--profile", action="store_true", help="where the time goes, before and after: tables, traces")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder of the CSV and the figures")
    parser.add_argument("--cache", type=Path, default=Path(".engines"), help="folder of compiled engines")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    from tqdm import tqdm

    from models.benchmark.worker import add_ratios, in_own_process, make_row
    from models.brats import find_cases
    from models.device import choose_device
    from models.errors import InputError
    from models.files import write_csv

    args.device = choose_device(args.device).type
    args.size = args.size or [128 if args.device == "cuda" else 96]
    args.feature_size = args.feature_size or (48 if args.device == "cuda" else 24)
    if args.case:
        find_cases(args.case)
    jobs = make_jobs(args, choose_contestants(args))
    args.out.mkdir(parents=True, exist_ok=True)
    measured = sorted({job["dtype"] for job in jobs if "status" not in job})
    print(f"Measuring matrix products in {', '.join(measured)}, and copies ...", file=sys.stderr)
    ability = in_own_process({"task": "device", "device": args.device, "dtypes": measured})
    if ability["status"] != "ok":
        raise InputError(f"--device {args.device}: {ability['status']}")
    table, earlier, common = open_table(args)
    rows = []
    for job in (progress := tqdm(jobs, unit="row")):
        progress.set_description(f"{job['model']}, {job['engine']}, {job['dtype']}, {job['size']}³")
        result = {"status": job["status"]} if "status" in job else in_own_process(job)
        rows.append(make_row(job, result, ability, COLUMNS) | common)
        add_ratios(rows)
        write_csv(table, earlier + rows)  # after every row: an interrupted run keeps what it has
    print_table(rows, ability)
    drawn = draw(args, jobs, rows, table)
    print(f"Written to {args.out}: {', '.join(path.name for path in (table, *drawn))}")
    print(json.dumps(summary(rows, ability, table)))
    return int(any(row["status"].startswith(("failed", "out of memory")) for row in rows))


# ---- what is measured ----------------------------------------------------------------------------------------------


def choose_contestants(args) -> list[dict]:
    """The networks of this run: `model` is what a row is called, `network` what it is, `source` its weights."""
    from models.benchmark.worker import MONAI
    from models.errors import InputError

    settings = {"unet": {}, "swinunetr": {"feature_size": args.feature_size}}
    fresh = {name: {"model": name, "network": name, "config": config} for name, config in settings.items()}
    twins = [MONAI + name for name in fresh]
    wanted = args.models or (twins if args.runs else [*fresh, *twins])
    chosen = [contestant_of(run, args) for run in args.runs] + [fresh[name] for name in fresh if name in wanted]
    engines = [engine for engine in MONAI_ENGINES if engine in (args.engines or MONAI_ENGINES)]
    if not engines and set(twins) & set(args.models or ()):
        raise InputError(f"--engines {' '.join(args.engines)}: MONAI's networks run in {', '.join(MONAI_ENGINES)}.")
    for name in fresh:
        if engines and MONAI + name in wanted:
            ours = [one for one in chosen if one["network"] == name and "engines" not in one]
            ours = ours or [fresh[name]] * bool(args.models)
            alike = {json.dumps(one["config"]): one for one in ours}  # one of MONAI's for all that are as large
            chosen += [{**one, "model": MONAI + one["model"], "engines": engines} for one in alike.values()]
    return chosen


def contestant_of(run: Path, args) -> dict:
    """A trained run, or a .pt2 file, which is an engine already; refused unless it was made for the size asked for."""
    from models.benchmark.worker import mean_test_dice
    from models.inference.exports import read_header
    from models.runs import load_checkpoint

    if run.suffix == ".pt2":
        header = read_header(run, args.device)
        batch, _, *sides = json.loads(header["shape"])
        refuse_other_size(args, run, sides, batch)
        return {"model": run.stem, "network": header["network"], "config": json.loads(header["config"]),
                "source": str(run), "engines": ["aot"], "dtypes": [header["dtype"]]}
    folder = run if run.is_dir() else run.parent
    checkpoint = load_checkpoint(run / "best.pt" if run.is_dir() else run)
    described = folder / "config.json"
    if described.is_file():
        refuse_other_size(args, run, json.loads(described.read_text())["size"])
    network = checkpoint["network"]
    return {"model": f"{network}-{folder.name}", "network": network, "config": checkpoint["config"],
            "source": str(run), "dice": mean_test_dice(folder)}


def refuse_other_size(args, run: Path, sides, batch: int | None = None):
    from models.errors import InputError

    if args.size != [sides[0]] or len(set(sides)) > 1:
        raise InputError(f"--size {' '.join(map(str, args.size))}: {run} was made for {' x '.join(map(str, sides))} "
                         "voxels. Say this size, and only this one.")
    if batch and args.batch_sizes != [batch]:
        raise InputError(f"--batch-sizes {' '.join(map(str, args.batch_sizes))}: {run} was made for {batch}.")


def make_jobs(args, contestants: list[dict]) -> list[dict]:
    """A job per row; one that cannot run here carries the reason as its `status`. What was asked for by name must run
    with one network at least."""
    import torch

    from models import size_multiple
    from models.benchmark.worker import cost_of, make_network
    from models.device import DTYPES, native_dtypes
    from models.errors import InputError
    from models.inference.engines import ENGINES, why_not

    device, jobs, reasons = torch.device(args.device), [], {}
    shared = {"task": "row", "device": args.device, "repeats": args.repeats, "max_seconds": args.max_seconds,
              "profile": None, **{key: str(getattr(args, key) or "") for key in ("case", "cache", "out")}}
    for one in contestants:
        multiple = size_multiple(one["network"])
        for size in args.size:
            if size % multiple:
                raise InputError(f"--size {size}: {one['network']} needs a multiple of {multiple}.")
        network = make_network(one)
        cost = {size: cost_of(network, size) for size in args.size}
        engines = one.get("engines") or args.engines or ENGINES
        possible = [dtype for dtype in DTYPES if why_not("eager", dtype, device, network) is None]
        native = [dtype for dtype in possible if DTYPES[dtype] in native_dtypes(device)]
        job = {**shared, "layout": args.layout, **one}
        for size, batch, engine in product(args.size, args.batch_sizes, engines):
            for dtype in one.get("dtypes") or args.dtypes or native:
                reason = why_not(engine, dtype, device, network)
                reasons.setdefault(f"--engines {engine} --dtypes {dtype}", []).append(reason)
                setting = {"size": size, "batch": batch, "engine": engine, "dtype": dtype, **cost[size]}
                jobs.append(job | setting | ({"status": f"not run: {reason}"} if reason else {}))
        if not (one.get("dtypes") or args.dtypes):
            setting = {"size": args.size[0], "batch": args.batch_sizes[0], "engine": "all", **cost[args.size[0]]}
            jobs += [job | setting | {"dtype": dtype, "status": "not run: emulated on this processor"}
                     for dtype in possible if dtype not in native]
    if args.engines or args.dtypes:
        for flags, given in reasons.items():
            if all(given):
                raise InputError(f"{flags}: cannot run here: {given[0]}.")
    return jobs


# ---- rows ----------------------------------------------------------------------------------------------------------


def open_table(args) -> tuple[Path, list[dict], dict]:
    """The CSV of this device and torch, the rows of earlier runs in it, and what the rows of this run share."""
    import torch

    from models.device import device_name
    from models.files import git_commit

    device = device_name(torch.device(args.device))
    slug = re.sub(r"[^a-z0-9.]+", "-", f"{device}-torch{torch.__version__}".lower()).strip("-")
    path = args.out / f"inference-{slug}.csv"
    earlier = list(csv.DictReader(path.open(newline=""))) if path.is_file() else []
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    common = {"date": time.strftime("%Y-%m-%d %H:%M"), "commit": git_commit(), "device": device,
              "torch": torch.__version__, "command": command}
    return path, [{column: row.get(column) for column in COLUMNS} for row in earlier], common


def print_table(rows: list[dict], ability: dict):
    peaks = ", ".join(f"{dtype} {peak:.3g}" for dtype, peak in ability["peak_tflops"].items())
    print(f"\nMeasured here: matrix products {peaks} TFLOP/s, copies {ability['bandwidth_gb_s']:.3g} GB/s.\n"
          "x MONAI: times faster than its class, eager in float32. first s: until the first result.")
    width = max(len(row["model"]) for row in rows)
    print(f"{'model':{width}} engine    type    batch size   p50 ms   p90 ms floor ms of peak   vol/s x MONAI    GiB "
          "first s max diff  labels layout, kernels")
    for row in rows:
        named = f"{row['model']:{width}} {row['engine']:9} {row['dtype']:7} {row['batch']:5} {row['size']:4} "
        if row["status"] != "ok":
            print(named + row["status"])
            continue
        forms = {"times_faster_than_monai_eager": ".2f", "max_logit_difference": ".1e", "label_agreement": ".2%"}
        faster, difference, agreement = (
            "-" if row[key] is None else format(row[key], form) for key, form in forms.items()
        )
        print(f"{named}{row['p50_ms']:8.4g} {row['p90_ms']:8.4g} {row['floor_ms']:8.3g} "
              f"{row['matrix_peak_share']:7.1%} {row['volumes_per_s']:7.3g} {faster:>7} {row['peak_gib']:6.2f} "
              f"{row['first_use_s']:7.1f} {difference:>8} {agreement:>7} {row['layout']}, {row['kernels']}")


# ---- figures -------------------------------------------------------------------------------------------------------


def draw(args, jobs, rows, table: Path) -> list[Path]:
    """The figures of this run; those over batch and size show every run in the table."""
    from models.benchmark import figures as plots
    from models.benchmark.worker import latest_rows
    from models.files import write_csv

    done = [row for row in rows if row["status"] == "ok"]
    if not done:
        return []
    title = f"{done[0]['device']}, torch {done[0]['torch']}, {done[0]['date']}"
    drawn = []

    def figure(name: str) -> Path:
        drawn.append(table.with_name(f"{table.stem}-{name}.png"))
        return drawn[-1]

    shapes = [*map(str, args.size), *(f"batch{batch}" for batch in args.batch_sizes if args.batch_sizes != [1])]
    plots.latency_bars(done, figure(f"latency-{'-'.join(shapes)}"), title)
    every = latest_rows(table)
    for name, x, y, labels in (
        ("throughput", "batch", "volumes_per_s", ("volumes per pass", "volumes per second")),
        ("memory", "size", "peak_gib", ("side in voxels", "peak GiB")),
    ):
        if not plots.lines_over(every, x, y, *labels, figure(name), title):
            drawn.pop()
    scored = [row for row in done if row["dice"] is not None]
    if scored:
        plots.speed_accuracy(scored, figure("speed-accuracy"), title)
    whole = {}
    for row in sorted(done, key=lambda row: row["p50_ms"]):
        if row["load_ms"] is not None:
            whole.setdefault(row["network"], {})[plots.row_name(row)] = {stage: row[f"{stage}_ms"] for stage in STAGES}
    if whole:
        plots.stacked_bars(whole, figure("end-to-end"), f"From four files to a label map on disk. {title}")
    if args.profile and (spent := profiles(jobs, rows, table)):
        plots.stacked_bars(spent, figure("profile"), f"Where the time of one pass goes. {title}")
        lines = [{"network": network, "row": row} | parts for network in spent for row, parts in spent[network].items()]
        write_csv(drawn[-1].with_suffix(".csv"), lines)
    return drawn


def profiles(jobs: list[dict], rows: list[dict], table: Path) -> dict[str, dict[str, dict[str, float]]]:
    """For each network, where the time goes in MONAI's class, eager in float32, and in the fastest engine of ours."""
    from models.benchmark.figures import row_name
    from models.benchmark.worker import MONAI, in_own_process, is_baseline

    spent = {}
    measured = [(row["p50_ms"], job) for job, row in zip(jobs, rows, strict=True) if row["status"] == "ok"]
    for network in dict.fromkeys(job["network"] for _, job in measured):
        of_network = [(ms, job) for ms, job in measured if job["network"] == network and job["size"] == jobs[0]["size"]]
        before = [one for one in of_network if is_baseline(one[1])]
        after = [one for one in of_network if not one[1]["model"].startswith(MONAI)]
        for when, chosen in (("before", before), ("after", after)):
            if chosen:
                job = min(chosen, key=lambda one: one[0])[1]
                result = in_own_process(job | {"profile": f"{table.stem}-profile-{network}-{when}"})
                if result["status"] == "ok":
                    spent.setdefault(network, {})[row_name(job)] = result["spent_ms"]
    return spent


def summary(rows: list[dict], ability: dict, table: Path) -> dict:
    """The last line on stdout: what was measured on, and the fastest row of every model."""
    keys = ("engine", "dtype", "layout", "batch", "size", "p50_ms", "floor_ms", "times_faster_than_monai_eager",
            "label_agreement")
    fastest = {}
    for row in sorted((row for row in rows if row["status"] == "ok"), key=lambda row: -row["volumes_per_s"]):
        fastest.setdefault(row["model"], {key: row[key] for key in keys})
    return {"csv": str(table), "rows": len(rows), "measured": sum(row["status"] == "ok" for row in rows),
            "peak_tflops": ability["peak_tflops"], "bandwidth_gb_s": ability["bandwidth_gb_s"], "fastest": fastest}


if __name__ == "__main__":
    cli.run(main)
