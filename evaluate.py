#!/usr/bin/env python3
"""Score trained runs, or label maps made by another program, as BraTS papers do, and predict folders of patients.

Predictions are taken back to the grid of the original files and scored there against the original segmentation: Dice,
HD95, surface Dice at 1 mm, volumes, and the lesion-wise scores of BraTS 2026 and 2023, for WT, TC, ET and each label.
The folder --out gets per_case.csv, summary.json, comparison.csv, figures, and report.html, which shows all of it.

Several runs are compared on the same cases. The folds of a cross-validation (--fold of the training scripts) become one
row of the tables, where every case is scored by the run that has not seen it.

  python evaluate.py models/unet/results/RUN
  torchrun --nproc-per-node 4 evaluate.py models/unet/results/RUN   (the cases shared among four GPUs)
  python evaluate.py models/unet/results/RUN models/swinunetr/results/RUN --ensemble --tta
  python evaluate.py models/unet/results/fold0 models/unet/results/fold1 models/unet/results/fold2
  python evaluate.py models/unet/results/RUN --cases FOLDER --save-nifti predictions   (raw cases, truth or no truth)
  python evaluate.py --predictions FOLDER --raw data/BraTS2021_Training_Data   (label maps <case>.nii.gz of any program)
"""

import sys
from datetime import timedelta
from pathlib import Path

from models import cli
from models.brats import LABEL_SCHEMES
from models.errors import InputError
from models.files import make_writable

PATIENCE = timedelta(days=7)  # of a process that is done with its cases and waits for those of another


def arguments():
    parser = cli.parser(__doc__)
    what = parser.add_argument_group("what is scored")
    what.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folder of a trained run, or its "
                      "checkpoint; or unet, swinunetr: the weights that come with the project")
    what.add_argument("--split", choices=("test", "validation", "train"),
                      help="which preprocessed cases (default: test; for folds, those that each has not seen)")
    what.add_argument("--data", type=Path, help="preprocessed cases (default: those that the run was trained on)")
    what.add_argument("--raw", type=Path, help="the raw cases that they were made from (default: as recorded in DATA)")
    what.add_argument("--cases", type=Path, metavar="FOLDER",
                      help="predict the raw cases of this folder instead, of any layout; those with truth are scored")
    what.add_argument("--predictions", type=Path, nargs="+", metavar="FOLDER", default=[],
                      help="score label maps <case>.nii.gz that another program made of the cases of --raw")
    what.add_argument("--labels", choices=LABEL_SCHEMES,
                      help="what the raw label values mean, where the names of the cases do not say")
    what.add_argument("--same-voxels", action="store_true", help="the files of a case share one grid, even if their "
                      "affines disagree; that of T1 counts")
    what.add_argument("--allow-trained-on", action="store_true",
                      help="score cases that a run was trained on, too, and mark them")
    how = parser.add_argument_group("how")
    how.add_argument("--space", choices=("native", "network"), default="native",
                     help="grid of the scores: that of the original files, or that of the tensors, whose scores do not "
                          "compare with published ones")
    how.add_argument("--ensemble", action="store_true", help="score the mean of the runs' probabilities as well")
    how.add_argument("--tta", action="store_true", help="average over the 8 mirror images: 8 times the work")
    how.add_argument("--overlap", type=cli.fraction, help="of sliding windows (default: as the run records, or 0.5)")
    how.add_argument("--small-et", action="store_true",
                     help="turn enhancing tumours below a volume into NCR: the volume that gives the best Dice on "
                          "each run's validation cases")
    how.add_argument("--islands", type=cli.fraction, default=0.0, metavar="SHARE",
                     help="parts of WT, TC or ET that lie apart and have fewer voxels than this share of the region's "
                          "largest part, such as 0.05, become background, ED or NCR: most are errors, unless there are "
                          "metastases")
    how.add_argument("--workers", type=cli.positive_int, default=cli.usable_cpus(),
                     help="processes that score while the networks run")
    cli.add_device_arguments(how)
    cli.add_engine_argument(how)
    out = parser.add_argument_group("output")
    out.add_argument("--save-nifti", type=Path, metavar="DIR",
                     help="write the predictions here on the original grid, as <case>.nii.gz; several runs get a "
                          "folder each")
    out.add_argument("--label-values", choices=LABEL_SCHEMES,
                     help="label values of these files, and of those of --predictions (default: as in the original "
                          "data set)")
    out.add_argument("--out", type=Path,
                     help="folder to write to (default: evaluation-<split>/ in the first run, or evaluation/)")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    refuse_flags(args)
    from tqdm import tqdm

    from models.device import choose_device, join_processes, rank
    from models.evaluation import jobs, outputs
    from models.evaluation.scoring import scored
    from models.evaluation.statistics import note_on_few_cases

    options, failures = cli.settings_of(args, jobs.Options), {}
    device = join_processes(choose_device(args.device), "gloo", PATIENCE)
    work = jobs.of_label_maps(options) if args.predictions else jobs.of_runs(options, device)
    out = args.out or default_out(args, work)
    make_writable(out)
    for entry in work.entries if args.save_nifti else ():
        make_writable(jobs.nifti_folder(options, work.entries, entry))
    jobs.make_ready(work, options, device)
    count = sum(len(part.share) for entry in work.entries for part in entry.parts)
    processes = min(args.workers, count // 4)  # each takes seconds to start
    done = scored(jobs.jobs_of(work, failures if args.cases else None), processes)
    done = list(tqdm(done, total=count, unit="case", disable=rank() > 0))
    kept = jobs.gathered(work, done, failures)
    if rank() > 0:
        return 0
    summary = outputs.write_all(out, work, kept, options, failures)
    print_tables(summary)
    if note := note_on_few_cases(summary["comparisons"]):
        print(note)
    for name, reason in sorted(failures.items()):
        print(f"failed: {name}: {reason}", file=sys.stderr)
    print(f"Written to {out}: " + ", ".join(sorted(path.name for path in out.iterdir()))
          + (f"; predictions in {args.save_nifti}" if args.save_nifti else ""))
    return 3 if failures else 0


def refuse_flags(args):
    """InputError for flags that do not go together, before anything is read."""
    if bool(args.runs) == bool(args.predictions):
        raise InputError("name the runs to evaluate, or give --predictions with the raw cases in --raw.")
    if args.predictions and not args.raw:
        raise InputError("--predictions: name the raw cases that they were made of with --raw.")
    if args.cases and (args.raw or args.split or args.data or args.space == "network"):
        raise InputError("--cases: takes all cases of its folder, in native space; --raw, --split, --data and --space "
                         "network do not go with it.")  # fmt: skip
    changes = args.ensemble or args.small_et or args.islands
    if args.predictions and (args.space == "network" or args.cases or args.save_nifti or changes):
        raise InputError("--predictions: label maps are scored as they are; --space network, --cases, --ensemble, "
                         "--small-et, --islands and --save-nifti do not go with it.")  # fmt: skip


def default_out(args, work) -> Path:
    if args.predictions:
        return Path("evaluation")
    kind = "cases" if args.cases else args.split or ("test" if len(work.entries[0].parts) == 1 else "cross-validation")
    return work.entries[0].runs[0].folder / f"evaluation-{kind}"


# ---- what is printed -----------------------------------------------------------------------------------------------


def print_tables(summary: dict):
    """Every run's scores: mean with its 95 % interval where there are several cases."""
    for name, run in summary["runs"].items():
        for space, targets in run["scores"].items():
            print(f"\n{name}: {run['counted']}, {space} space"
                  + (", 8 mirror images" if summary["tta"] else "")
                  + (f"; TRAINED ON {run['trained_on']} of them" if run["trained_on"] else ""))
            print_scores(targets)
            print_rules(targets)
        print_cost(name, run)
    for row in summary["comparisons"]:
        if row["measure"] == "dice":
            print(f"{row['second']} - {row['first']}, {row['space']} {row['target']:3}: mean difference in Dice "
                  f"{row['mean_difference']:+.4f}{interval(row['interval'])}, Wilcoxon p {row['wilcoxon_p']:.3g}, "
                  f"Holm-corrected {row['holm_p']:.3g} (cases: {row['cases']})")


def print_scores(targets: dict):
    columns = {
        "dice": "Dice", "ceiling_dice": "ceiling", "hd95_mm": "HD95 mm", "nsd_1mm": "NSD 1mm",
        "lesion2026_dice": "BraTS 2026", "lesion2023_dice": "BraTS 2023",
    }  # fmt: skip
    shown = [column for column in columns if any(column in measures for measures in targets.values())]
    print("     " + "".join(f"{columns[column]:>26}" for column in shown))
    for target, measures in targets.items():
        found = (measures.get(column) for column in shown)
        cells = [f"{one['mean']:.4f}{interval(one['interval'])}" if one else "-" for one in found]
        print(f"{target:5}" + "".join(f"{cell:>26}" for cell in cells))


def interval(ends) -> str:
    return f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else ""


def print_rules(targets: dict):
    """How often a rule decided the scores because a mask was empty."""
    texts = []
    for kind, rule in (("both", "1, 0 mm"), ("prediction", "0, 374 mm"), ("truth", "0, 374 mm")):
        counts = {target: measures["empty"][kind] for target, measures in targets.items() if measures["empty"][kind]}
        name = {"both": "truth and prediction empty", "prediction": "prediction alone", "truth": "truth alone"}[kind]
        texts.append(f"{name} ({rule}): {counts or 'never'}")
    print("; ".join(texts) + ".")


def print_cost(name: str, run: dict):
    if run.get("parameters"):
        minutes = "-" if run["training_minutes"] is None else f"{run['training_minutes']:.1f} min of training"
        print(f"{name}: {run['parameters'] / 1e6:.1f} million parameters, {run['gmac']:.1f} GMAC a pass, "
              f"{run['forward_seconds_per_case']:.2f} s a case ({run['engine']}), {minutes}.")


if __name__ == "__main__":
    cli.run(main)
