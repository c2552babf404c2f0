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

import json
import statistics
from pathlib import Path

from models import cli
from models.errors import InputError
from models.files import write_atomically, write_csv


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
    from models import evaluation
    from models.cases import find_cases
    from models.device import choose_device
    from models.metrics import compare, summarise
    from models.runs import load_model, open_run

    if args.ensemble and len(args.runs) < 2:
        raise InputError("--ensemble: name two runs or more.")
    device = choose_device(args.device)
    opened = [open_run(path) for path in args.runs]
    names = evaluation.names_of(opened, args.ensemble)
    data, cases = evaluation.choose_cases(opened, args.data, args.split)
    raw = {case.name: case for case in find_cases(args.raw)} if args.raw else None
    missing = [case for case in cases if raw is not None and case not in raw]
    if missing:
        raise InputError(f"{args.raw}: has no case {missing[0]}. Give the raw cases that {data} was made from.")
    # All networks before the first case: damaged weights must not cost an hour.
    loaded = [(load_model(run.checkpoint, device)[0], run) for run in opened]
    out = args.out or opened[0].folder / f"evaluation-{args.split}"
    for folder in filter(None, (out, args.save_nifti)):
        folder.mkdir(parents=True, exist_ok=True)

    evaluated = {name: [member] for name, member in zip(names, loaded, strict=True)}
    if args.ensemble:
        evaluated[evaluation.ENSEMBLE] = loaded
    rows, maps, summary = [], {}, {"split": args.split, "cases": len(cases), "tta": args.tta, "runs": {}}
    for name, members in evaluated.items():
        predictions = evaluation.predict_cases(members, data, cases, device, args.engine, args.amp, args.tta)
        suffix = f"_{name}" if len(evaluated) > 1 else ""
        scored, maps[name], seconds = evaluation.score_run(name, predictions, len(cases), raw, args.save_nifti, suffix)
        rows += scored
        alone = members[0][1] if len(members) == 1 else None
        summary["runs"][name] = {
            "model": "+".join(dict.fromkeys(run.network for _, run in members)),
            "epoch": alone.epoch if alone else None,
            **evaluation.costs([network for network, _ in members], data, cases[0]),
            "training_minutes": evaluation.training_minutes(alone) if alone else None,
            "forward_seconds_per_case": statistics.median(seconds),
            **summarise(scored),
        }
        prefix = f"{name}_" if len(evaluated) > 1 else ""
        evaluation.draw_extremes(name, scored, maps[name], data, out, prefix)
    if len(evaluated) > 1:
        summary["comparisons"] = [row for other in [*evaluated][1:] for row in compare(rows, names[0], other)]
        evaluation.draw_comparison(summary, rows, maps, data, out)
        write_csv(out / "comparison.csv", comparison_table(summary))
    write_csv(out / "per_case.csv", rows)
    write_atomically(out / "summary.json", json.dumps(summary, indent=1))
    print_table(summary)
    print(f"Written to {out}: " + ", ".join(sorted(path.name for path in out.iterdir()))
          + (f"; predictions in {args.save_nifti}" if args.save_nifti else ""))
    return 0


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


def print_table(summary: dict):
    targets = list(next(iter(summary["runs"].values()))["network"])
    print(f"\nDice, mean ± sd over {summary['cases']} {summary['split']} cases"
          + (", 8 mirror images" if summary["tta"] else ""))  # fmt: skip
    width = max(len(name) for name in ("run", *summary["runs"]))
    print(f"{'run':{width}}  {'space':8}" + "".join(f"{target:>14}" for target in targets)
          + f"{'M param':>9}{'GMAC':>8}{'s/case':>8}{'min':>7}")
    for name, run in summary["runs"].items():
        minutes = "-" if run["training_minutes"] is None else f"{run['training_minutes']:.1f}"
        cost = f"{run['parameters'] / 1e6:9.1f}{run['gmac']:8.1f}{run['forward_seconds_per_case']:8.2f}{minutes:>7}"
        for space in ("network", "native"):
            if space in run:
                cells = "".join(f"{run[space][t]['mean']:8.4f}±{run[space][t]['sd']:.3f}" for t in targets)
                print(f"{name:{width}}  {space:8}{cells}{cost}")
                both = {t: run[space][t]["both_empty"] for t in targets if run[space][t]["both_empty"]}
                one = {t: run[space][t]["one_empty"] for t in targets if run[space][t]["one_empty"]}
                print(f"{'':{width}}  truth and prediction empty (Dice 1): {both or 'never'}; "
                      f"one of them (Dice 0): {one or 'never'}")
    print("M param: million parameters; GMAC per volume; s/case: the network alone; min: training")
    for row in summary.get("comparisons", []):
        print(f"{row['second']} - {row['first']}, {row['space']} {row['target']:3}: mean difference "
              f"{row['mean_difference']:+.4f}, Wilcoxon p {row['wilcoxon_p']:.3g} (cases: {row['cases']})")
    if summary.get("comparisons") and summary["cases"] < 6:
        print("Fewer than 6 cases are too few for any difference to reach p < 0.05.")


if __name__ == "__main__":
    cli.run(main)
