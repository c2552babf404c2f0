#!/usr/bin/env python3
"""Score trained runs case by case: Dice of the labels (NCR, ED, ET) and regions (WT, TC, ET), and overlays.

Writes per_case.csv, summary.json and overlays of the best, median and worst case to --out. With --raw the prediction is
also taken back to the grid of the original files and scored there, which is what other papers' numbers mean.

Several runs are compared on the same cases, the first with each of the others: comparison.csv (a row per run),
comparison_dice.png (every case under each run), Wilcoxon's paired test, and overlays of the cases that differ most.

  python evaluate.py models/unet/results/RUN
  python evaluate.py models/unet/results/RUN models/swinunetr/results/RUN --ensemble
  python evaluate.py models/unet/results/RUN --raw data/BraTS2021_Training_Data --tta --save-nifti predictions
  python evaluate.py models/unet/results/RUN --split validation --device cpu
"""

import csv
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
    parser.add_argument("--ensemble", action="store_true", help="score the mean of the runs' probabilities as well")
    parser.add_argument("--save-nifti", type=Path, metavar="DIR",
                        help="write the predictions here, on the original grid with the original label values")
    parser.add_argument("--out", type=Path, help="folder to write to (default: evaluation-<split>/ in the first run)")
    cli.add_device_arguments(parser)
    cli.add_engine_argument(parser)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    from models import load_model, training
    from models.brats import find_cases
    from models.device import choose_device
    from models.errors import InputError
    from models.files import write_atomically
    from models.metrics import compare, summarise

    if args.ensemble and len(args.runs) < 2:
        raise InputError("--ensemble: name two runs or more.")
    device = choose_device(args.device)
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

    contestants = {name: [loaded[run]] for name, run in zip(called, args.runs, strict=True)}
    if args.ensemble:
        contestants["ensemble"] = list(loaded.values())
    rows, maps, summary = [], {}, {"split": args.split, "cases": len(names), "tta": args.tta, "runs": {}}
    for name, members in contestants.items():
        models = [model for model, _ in members]
        scored, maps[name], seconds = score_run(name, members, data, names, raw, args, device)
        rows += scored
        run = args.runs[called.index(name)] if name in called else None
        summary["runs"][name] = {
            "model": "+".join(dict.fromkeys(checkpoint["network"] for _, checkpoint in members)),
            "epoch": members[0][1]["epoch"] if run else None,
            **costs(models, data, names[0], run),
            "forward_seconds_per_case": statistics.median(seconds),
            **summarise(scored),
        }
        draw_extremes(name, scored, maps[name], data, out, prefix=f"{name}_" if len(contestants) > 1 else "")
    if len(contestants) > 1:
        others = list(contestants)[1:]
        summary["comparisons"] = [row for other in others for row in compare(rows, called[0], other)]
        draw_comparison(summary, rows, maps, data, out)
        training.write_csv(out / "comparison.csv", comparison_table(summary))
    training.write_csv(out / "per_case.csv", rows)
    write_atomically(out / "summary.json", json.dumps(summary, indent=1))
    print_table(summary, args)
    print(f"Written to {out}: " + ", ".join(sorted(path.name for path in out.iterdir()))
          + (f"; predictions in {args.save_nifti}" if args.save_nifti else ""))
    return 0


def folder_of(run: Path) -> Path:
    return run if run.is_dir() else run.parent


def run_names(loaded: dict) -> list[str]:
    """What each run is called in the tables: its folder's name, with the network's before it where two are the same."""
    from models.errors import InputError

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
    from models.dataset import manifest_checksum, read_split
    from models.errors import InputError

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


def costs(models: list, data: Path, case: str, run: Path | None) -> dict:
    """Parameters and GMAC per volume of the networks together, and how many minutes the run trained."""
    from models.cost import forward_macs, parameter_count
    from models.dataset import load_case

    shape = (1, *load_case(data / f"{case}.pt", as_stored=True)["image"].shape)
    log = folder_of(run) / "train.csv" if run else None
    minutes = None
    if log and log.is_file():
        with log.open(newline="") as file:
            minutes = sum(float(row["seconds"]) for row in csv.DictReader(file)) / 60
    return {
        "parameters": sum(map(parameter_count, models)),
        "gmac": sum(forward_macs(model, shape) for model in models) / 1e9,
        "training_minutes": minutes,
    }


def score_run(run: str, members: list, data: Path, names, raw, args, device):
    """Predict every case, by the mean of the probabilities of the members (network, checkpoint). Returns rows for
    per_case.csv, case -> label map uint8 [D, H, W], and seconds per case."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from models.brats import read_case, to_raw_labels, to_training_labels, write_label_nifti
    from models.dataset import load_case
    from models.device import inference_dtype
    from models.errors import InputError
    from models.inference.engines import choose_engine
    from models.inference.predict import predict
    from models.preprocessing import label_map, native_label_map, network_spacing_mm

    dtypes = [inference_dtype(args.amp, checkpoint.get("amp", "off"), device) for _, checkpoint in members]
    first = load_case(data / f"{names[0]}.pt")["image"].to(device)
    networks = [choose_engine(model, args.engine, dtype, first.shape[-1], device)
                for (model, _), dtype in zip(members, dtypes, strict=True)]  # fmt: skip
    for network, dtype in zip(networks, dtypes, strict=True):
        predict(network, first, dtype)  # the first pass of a process is slower: it is not timed
    rows, maps, seconds = [], {}, []
    for name in tqdm(names, desc=run, unit="case"):
        case = load_case(data / f"{name}.pt")
        if "label" not in case:
            raise InputError(f"{data / name}.pt: has no label, so it cannot be scored.")
        image = case["image"].to(device)
        start = time.perf_counter()
        predicted = [predict(network, image, dtype, args.tta) for network, dtype in zip(networks, dtypes, strict=True)]
        probabilities = sum(predicted) / len(predicted)  # [4, D, H, W]
        prediction = label_map(probabilities).cpu()  # waits for the device
        seconds.append(time.perf_counter() - start)
        maps[name] = prediction.numpy()
        geometry, scheme = case["geometry"], case["label_scheme"]
        voxel_ml = float(np.prod(network_spacing_mm(geometry))) / 1e3
        rows += score_case(run, name, "network", prediction, case["label"][0], voxel_ml)
        if raw is None and not args.save_nifti:
            continue
        native = native_label_map(probabilities.cpu(), geometry)  # [X, Y, Z]
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


def comparison_table(summary: dict) -> list[dict]:
    """A row per run: mean Dice by target in each space, and what the network costs."""
    rows = []
    for name, run in summary["runs"].items():
        spaces = [space for space in ("network", "native") if space in run]
        dice = {f"dice_{space}_{target}": run[space][target]["mean"] for space in spaces for target in run[space]}
        cost = {key: run[key] for key in ("parameters", "gmac", "forward_seconds_per_case", "training_minutes")}
        rows.append({"run": name, "model": run["model"], "split": summary["split"], "cases": summary["cases"],
                     **dice, **cost})  # fmt: skip
    return rows


def print_table(summary: dict, args):
    from models.brats import TARGETS

    print(f"\nDice, mean ± sd over {summary['cases']} {args.split} cases" + (", 8 mirror images" if args.tta else ""))
    width = max(len(name) for name in ("run", *summary["runs"]))
    print(f"{'run':{width}}  {'space':8}" + "".join(f"{target:>14}" for target in TARGETS)
          + f"{'M param':>9}{'GMAC':>8}{'s/case':>8}{'min':>7}")
    for name, run in summary["runs"].items():
        minutes = "-" if run["training_minutes"] is None else f"{run['training_minutes']:.1f}"
        cost = f"{run['parameters'] / 1e6:9.1f}{run['gmac']:8.1f}{run['forward_seconds_per_case']:8.2f}{minutes:>7}"
        for space in ("network", "native"):
            if space in run:
                cells = "".join(f"{run[space][t]['mean']:8.4f}±{run[space][t]['sd']:.3f}" for t in TARGETS)
                print(f"{name:{width}}  {space:8}{cells}{cost}")
                both = {t: run[space][t]["both_empty"] for t in TARGETS if run[space][t]["both_empty"]}
                one = {t: run[space][t]["one_empty"] for t in TARGETS if run[space][t]["one_empty"]}
                print(f"{'':{width}}  truth and prediction empty (Dice 1): {both or 'never'}; "
                      f"one of them (Dice 0): {one or 'never'}")
    print("M param: million parameters; GMAC per volume; s/case: the network alone; min: training")
    for row in summary.get("comparisons", []):
        print(f"{row['second']} - {row['first']}, {row['space']} {row['target']:3}: mean difference "
              f"{row['mean_difference']:+.4f}, Wilcoxon p {row['wilcoxon_p']:.3g} (cases: {row['cases']})")
    if summary.get("comparisons") and summary["cases"] < 6:
        print("Fewer than 6 cases are too few for any difference to reach p < 0.05.")


def draw_extremes(run: str, rows: list[dict], maps: dict, data: Path, out: Path, prefix: str):
    """overlay_best.png, overlay_median.png and overlay_worst.png by mean label Dice of network space."""
    from models.brats import TARGETS
    from models.dataset import load_case
    from models.metrics import mean_label_dice
    from models.plots import prediction_overlay

    dice = dice_of_cases(rows, run)
    ranked = sorted(dice, key=lambda case: mean_label_dice(dice[case]), reverse=True)
    for role, name in (("best", ranked[0]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[-1])):
        case = load_case(data / f"{name}.pt")
        scores = ", ".join(f"{target} {dice[name][target]:.3f}" for target in TARGETS)
        title = f"{run}: {role} of {len(ranked)} cases by mean label Dice: {name}\nDice {scores}"
        path = out / f"{prefix}overlay_{role}.png"
        prediction_overlay(case["image"].numpy(), case["label"][0].numpy(), {"prediction": maps[name]}, path, title)


def draw_comparison(summary: dict, rows: list[dict], maps: dict, data: Path, out: Path):
    """comparison_dice.png, and comparison_overlay_1.png to _3.png: the cases whose mean label Dice differs most between
    the first run and another."""
    from models.brats import REGIONS
    from models.dataset import load_case
    from models.metrics import mean_label_dice
    from models.plots import paired_dice, prediction_overlay

    dice = {run: dice_of_cases(rows, run) for run in summary["runs"]}
    first, *others = dice
    tests = [row for row in summary["comparisons"] if row["space"] == "network"]
    notes = {region: "Wilcoxon p " + ", ".join(f"{row['wilcoxon_p']:.2g}" for row in tests if row["target"] == region)
             for region in REGIONS}  # fmt: skip
    scores = {region: {run: [case[region] for case in cases.values()] for run, cases in dice.items()}
              for region in REGIONS}  # fmt: skip
    cases = f"{summary['cases']} {summary['split']} case{'s' * (summary['cases'] != 1)}"
    title = f"{cases}; each run tested against {first}"
    paired_dice(scores, out / "comparison_dice.png", title, notes)

    means = {run: {case: mean_label_dice(scores) for case, scores in cases.items()} for run, cases in dice.items()}
    spread = {case: max(abs(means[run][case] - means[first][case]) for run in others) for case in means[first]}
    for place, name in enumerate(sorted(spread, key=spread.get, reverse=True)[:3], start=1):
        case = load_case(data / f"{name}.pt")
        title = f"{name}, number {place} of the cases that differ most\nmean label Dice "
        title += ", ".join(f"{run} {means[run][name]:.3f}" for run in means)
        path = out / f"comparison_overlay_{place}.png"
        shown = {run: maps[run][name] for run in maps}
        prediction_overlay(case["image"].numpy(), case["label"][0].numpy(), shown, path, title)


def dice_of_cases(rows: list[dict], run: str) -> dict[str, dict[str, float]]:
    """case -> target -> Dice of one run in network space."""
    dice = {}
    for row in rows:
        if row["run"] == run and row["space"] == "network":
            dice.setdefault(row["case"], {})[row["target"]] = row["dice"]
    return dice


if __name__ == "__main__":
    cli.run(main)
