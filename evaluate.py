#!/usr/bin/env python3
"""Score trained runs case by case: Dice of the labels (NCR, ED, ET) and regions (WT, TC, ET), and overlays.

Writes per_case.csv, summary.json and overlays of the best, median and worst case to --out. With --raw the prediction is
also taken back to the grid of the original files and scored there, which is what other papers' numbers mean.

  python evaluate.py models/unet/results/RUN
  python evaluate.py models/unet/results/RUN --raw data/BraTS2021_Training_Data --tta --save-nifti predictions
  python evaluate.py models/unet/results/RUN --split validation --device cpu
"""

import json
import statistics
import time
from pathlib import Path

from models import cli


def arguments():
    parser = cli.parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a trained run, or its checkpoint")
    parser.add_argument("--data", type=Path, help="preprocessed cases (default: those that the run was trained on)")
    parser.add_argument("--split", choices=("test", "validation", "train"), default="test", help="which cases to score")
    parser.add_argument("--raw", type=Path, help="raw cases: score on the original voxel grid too")
    parser.add_argument("--tta", action="store_true", help="average over the 8 mirror images: 8 times the work")
    parser.add_argument("--save-nifti", type=Path, metavar="DIR",
                        help="write the predictions here, on the original grid with the original label values")
    parser.add_argument("--out", type=Path, help="folder to write to (default: evaluation-<split>/ in the first run)")
    cli.add_device_arguments(parser)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    from models import load_model, training
    from models.brats import InputError, find_cases, write_atomically

    device = training.choose_device(args.device)
    dtype = training.amp_dtype(args.amp, device)
    loaded = {run: load_model(run, device) for run in args.runs}  # before any work: a wrong file must not cost an hour
    called = run_names(loaded)
    data, names = choose_cases(args)
    raw = {case.name: case for case in find_cases(args.raw)} if args.raw else None
    missing = [name for name in names if raw is not None and name not in raw]
    if missing:
        raise InputError(f"{args.raw}: has no case {missing[0]}. Give the raw cases that {data} was made from.")
    out = args.out or folder_of(args.runs[0]) / f"evaluation-{args.split}"
    for folder in filter(None, (out, args.save_nifti)):
        folder.mkdir(parents=True, exist_ok=True)

    rows, summary = [], {"split": args.split, "cases": len(names), "tta": args.tta, "runs": {}}
    for name, (model, checkpoint) in zip(called, loaded.values(), strict=True):
        scored, maps, seconds = score_run(name, model, data, names, raw, args, device, dtype)
        rows += scored
        summary["runs"][name] = {
            "network": checkpoint["network"],
            "epoch": checkpoint["epoch"],
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "forward_seconds_per_case": statistics.median(seconds),
            **summarise(scored),
        }
        draw_extremes(name, scored, maps, data, out, prefix=f"{name}_" if len(loaded) > 1 else "")
    training.write_csv(out / "per_case.csv", rows)
    write_atomically(out / "summary.json", json.dumps(summary, indent=1))
    print_table(summary, args)
    print(f"Written to {out}: per_case.csv, summary.json, overlay_best.png, overlay_median.png, overlay_worst.png"
          + (f"; predictions in {args.save_nifti}" if args.save_nifti else ""))
    return 0


def folder_of(run: Path) -> Path:
    return run if run.is_dir() else run.parent


def run_names(loaded: dict) -> list[str]:
    """What each run is called in the tables: its folder's name, with the network's before it where two are the same."""
    from models.brats import InputError

    names = [folder_of(run).name for run in loaded]
    if len(set(names)) == len(names):
        return names
    names = [f"{checkpoint['network']}-{name}" for name, (_, checkpoint) in zip(names, loaded.values(), strict=True)]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two runs are both called {name}: rename the folder of one of them.")
    return names


def choose_cases(args) -> tuple[Path, list[str]]:
    """The data folder and the cases of the split, as each run recorded them; runs that differ are refused."""
    from models.brats import InputError
    from models.dataset import manifest_checksum, read_split

    chosen = {}
    for run in args.runs:
        path = folder_of(run) / "config.json"
        config = json.loads(path.read_text()) if path.is_file() else None
        data = args.data or Path(config["arguments"]["data"] if config else "data/preprocessed_tensors")
        names = config["split"][args.split] if config else read_split(data)[args.split]
        if config and manifest_checksum(data) != config["data_manifest_sha256"]:
            print(f"Note: {data} is not what {run} was trained on (its manifest differs).")
        chosen[run] = (data, names, manifest_checksum(data))
    first = args.runs[0]
    for run, (data, names, checksum) in chosen.items():
        if names != chosen[first][1]:
            raise InputError(f"{run} and {first} have different {args.split} cases, so their scores do not compare.")
        if checksum != chosen[first][2]:
            raise InputError(f"{run} was trained on {data} and {first} on {chosen[first][0]}: say which with --data.")
    return chosen[first][:2]


def score_run(run: str, model, data: Path, names, raw, args, device, dtype):
    """Predict every case. Returns rows for per_case.csv, case -> label map uint8 [D, H, W], and seconds per case."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from models.brats import InputError, read_case, to_raw_labels, to_training_labels, write_label_nifti
    from models.dataset import load_case
    from models.inference import predict
    from models.preprocessing import network_spacing_mm, to_native

    rows, maps, seconds = [], {}, []
    for name in tqdm(names, desc=run, unit="case"):
        case = load_case(data / f"{name}.pt")
        if "label" not in case:
            raise InputError(f"{data / name}.pt: has no label, so it cannot be scored.")
        image = case["image"].to(device)
        start = time.perf_counter()
        probabilities = predict(model, image, dtype, args.tta)  # [4, D, H, W]
        prediction = probabilities.argmax(0).to(torch.uint8).cpu()  # waits for the device
        seconds.append(time.perf_counter() - start)
        maps[name] = prediction.numpy()
        geometry, scheme = case["geometry"], case["label_scheme"]
        voxel_ml = float(np.prod(network_spacing_mm(geometry))) / 1e3
        rows += score_case(run, name, "network", prediction, case["label"][0], voxel_ml)
        if raw is None and not args.save_nifti:
            continue
        native = to_native(probabilities.cpu(), geometry).argmax(0).to(torch.uint8)  # [X, Y, Z]
        if raw is not None and raw[name].labelled:
            truth = torch.from_numpy(to_training_labels(read_case(raw[name]).label, scheme, name))
            voxel_ml = abs(float(np.linalg.det(np.array(geometry["affine"])[:3, :3]))) / 1e3
            rows += score_case(run, name, "native", native, truth, voxel_ml)
        if args.save_nifti:
            stem = name if len(args.runs) == 1 else f"{name}_{run}"
            label = to_raw_labels(native.numpy(), scheme)
            write_label_nifti(args.save_nifti / f"{stem}.nii.gz", label, np.array(geometry["affine"]))
    return rows, maps, seconds


def score_case(run: str, case: str, space: str, prediction, truth, voxel_ml: float) -> list[dict]:
    from models.metrics import confusion, dice_per_target, volumes_per_target

    counts = confusion(prediction, truth)
    dice, volumes = dice_per_target(counts), volumes_per_target(counts)
    return [
        {"run": run, "case": case, "space": space, "target": target, "dice": dice[target],
         "predicted_ml": volumes[target][1] * voxel_ml, "true_ml": volumes[target][2] * voxel_ml}
        for target in dice
    ]  # fmt: skip


def summarise(rows: list[dict]) -> dict:
    """Per space and target: mean, standard deviation, median and range of the Dice, and how often a mask was empty."""
    summary = {}
    for space in sorted({row["space"] for row in rows}):
        summary[space] = {}
        for target in dict.fromkeys(row["target"] for row in rows):
            chosen = [row for row in rows if row["space"] == space and row["target"] == target]
            dice = [row["dice"] for row in chosen]
            empty = [(row["predicted_ml"] == 0) + (row["true_ml"] == 0) for row in chosen]
            summary[space][target] = {
                "mean": statistics.fmean(dice),
                "sd": statistics.stdev(dice) if len(dice) > 1 else 0.0,
                "median": statistics.median(dice),
                "min": min(dice),
                "max": max(dice),
                "both_empty": empty.count(2),
                "one_empty": empty.count(1),
            }
    return summary


def print_table(summary: dict, args):
    from models.brats import TARGETS

    print(f"\nDice, mean ± sd over {summary['cases']} {args.split} cases" + (", 8 mirror images" if args.tta else ""))
    width = max(len(name) for name in ("run", *summary["runs"]))
    print(f"{'run':{width}}  {'space':8}" + "".join(f"{target:>15}" for target in TARGETS) + f"{'s/case':>9}")
    for name, run in summary["runs"].items():
        for space in ("network", "native"):
            if space in run:
                cells = "".join(f"{run[space][t]['mean']:8.4f} ±{run[space][t]['sd']:.3f}" for t in TARGETS)
                print(f"{name:{width}}  {space:8}{cells}{run['forward_seconds_per_case']:9.2f}")
                both = {t: run[space][t]["both_empty"] for t in TARGETS if run[space][t]["both_empty"]}
                one = {t: run[space][t]["one_empty"] for t in TARGETS if run[space][t]["one_empty"]}
                print(f"{'':{width}}  truth and prediction empty (Dice 1): {both or 'never'}; "
                      f"one of them (Dice 0): {one or 'never'}")


def draw_extremes(run: str, rows: list[dict], maps: dict, data: Path, out: Path, prefix: str):
    """overlay_best.png, overlay_median.png and overlay_worst.png by mean label Dice of network space."""
    from models.brats import TARGETS
    from models.dataset import load_case
    from models.metrics import mean_label_dice
    from models.plots import prediction_overlay

    dice = {}
    for row in rows:
        if row["space"] == "network":
            dice.setdefault(row["case"], {})[row["target"]] = row["dice"]
    ranked = sorted(dice, key=lambda case: mean_label_dice(dice[case]), reverse=True)
    for role, name in (("best", ranked[0]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[-1])):
        case = load_case(data / f"{name}.pt")
        scores = ", ".join(f"{target} {dice[name][target]:.3f}" for target in TARGETS)
        title = f"{run}: {role} of {len(ranked)} cases by mean label Dice: {name}\nDice {scores}"
        path = out / f"{prefix}overlay_{role}.png"
        prediction_overlay(case["image"].numpy(), case["label"][0].numpy(), {"prediction": maps[name]}, path, title)


if __name__ == "__main__":
    cli.run(main)
