#!/usr/bin/env python3
"""Turn raw BraTS cases (NIfTI) into tensors (.pt) once, so that training never waits for a file format.

Per case: reorient to RAS, resample to 1 mm, each modality to 0-1 (or z-scores), crop to the head, resize to a cube (or
not), labels to 0-3. A case that is done with the same settings is skipped, so an interrupted run goes on where it
stopped.

  python preprocess_brats.py data/BraTS2021_Training_Data data/preprocessed_tensors
  python preprocess_brats.py RAW OUT --compact --workers 8    (19 MB a case instead of 50)
  python preprocess_brats.py RAW OUT --shard 0/4              (a quarter of the cases; the others elsewhere)
  python preprocess_brats.py RAW OUT --size native            (1 mm as it is, for a training with --patch 128)
  python preprocess_brats.py RAW OUT --limit 8 --size 64      (a first look, in a minute on any computer)
"""

import os
import shutil
import sys
from argparse import ArgumentTypeError
from pathlib import Path

from models import cli
from models.brats import LABEL_SCHEMES
from models.errors import InputError
from models.files import make_writable, portable
from models.manifest import claim, finish, manifest_path, merge_shards, open_manifest, write_manifest

VERSION = 2  # of the preprocessing itself: raise it when the same settings would give other tensors
NATIVE_MM3 = 3.4e6  # of a head after the crop: the largest of 12 cases of BraTS, whose mean is 3.2e6


def arguments():
    parser = cli.parser(__doc__)
    parser.add_argument("raw", nargs="?", type=Path, default=Path("data/BraTS2021_Training_Data"), metavar="RAW",
                        help="folder with the raw cases, in a layout of BraTS, MSD Task01 or nnU-Net")
    parser.add_argument("out", nargs="?", type=Path, default=Path("data/preprocessed_tensors"), metavar="OUT",
                        help="folder for the tensors, manifest.json and splits.json")
    parser.add_argument("--size", type=cube_side, default=128,
                        help="side of the cube in voxels; native: the crop keeps its own size, and a training takes "
                             "patches of it (--patch)")
    parser.add_argument("--spacing", type=cli.positive_float, default=1.0, help="voxel size in mm before the crop")
    parser.add_argument("--normalize", choices=("percentile", "zscore"), default="percentile",
                        help="each modality to 0-1 between two percentiles of its non-zero voxels, or to mean 0 and "
                             "standard deviation 1 over these")
    parser.add_argument("--labels", choices=LABEL_SCHEMES,
                        help="what the raw label values mean, where the names of the cases do not say")
    parser.add_argument("--same-voxels", action="store_true", help="the files of a case share one grid, even if their "
                        "affines disagree; that of T1 counts")
    parser.add_argument("--workers", type=cli.positive_int, default=cli.usable_cpus(),
                        help="processes, or fewer if the memory is too small for what each takes at most: 0.6 GiB for "
                             "the volumes of BraTS, more for larger ones")
    parser.add_argument("--compact", action="store_true", help="store float16 and uint8: 19 MB a case instead of 50")
    parser.add_argument("--limit", type=cli.positive_int, help="take only the first N cases")
    parser.add_argument("--shard", metavar="I/N", help="do only every N-th case from the I-th on, counted from 0; the "
                        "last shard to finish merges them (default: RANK and WORLD_SIZE of torchrun)")
    parser.add_argument("--seed", type=cli.natural, default=0, help="of the split into train, validation and test")
    parser.add_argument("--test-share", type=share_of_test, default=0.1,
                        help="of the patients, for the test; 0: no test cases, every patient is in a fold")
    parser.add_argument("--folds", type=cli.positive_int, default=5, help="cross-validation folds")
    return parser.parse_args()


def cube_side(text: str) -> int | None:
    return None if text == "native" else cli.positive_int(text)


def share_of_test(text: str) -> float:
    share = cli.fraction(text)
    if share > 0.8:
        raise ArgumentTypeError(f"{text} leaves too few patients to train on; 0.8 is the most")
    return share


def main() -> int:
    args = arguments()
    from models import cohort
    from models.cases import find_cases

    shard = choose_shard(args.shard)
    found = find_cases(args.raw, args.labels, args.same_voxels)[: args.limit]
    schemes = cohort.describe(found, args.raw)
    settings = {"version": VERSION, "size": args.size, "spacing_mm": args.spacing, "compact": args.compact,
                "normalize": args.normalize}  # fmt: skip
    division = {"seed": args.seed, "folds": args.folds, "test_share": args.test_share}
    run = {"settings": settings, "cases": len(found), "labels": schemes, **division}
    make_writable(args.out)
    cases = found[shard[0] :: shard[1]] if shard else found
    manifest = open_manifest(args.out, run, [case.name for case in cases], shard)
    todo = [case for case in cases if not cohort.is_done(case, manifest)]
    workers = cohort.fitting_workers(todo, settings, args.workers)
    refuse_full_disk(args, len(todo))
    claim(args.out, run, manifest, shard)
    print((f"Shard {shard[0]} of {shard[1]}: " if shard else "")
          + f"{len(cases) - len(todo)} cases are done already, {len(todo)} to do with {workers} workers.")
    own = manifest_path(args.out, shard)
    failures = cohort.process(todo, settings, args.out, workers, manifest, own) if todo else {}
    for name, reason in sorted(failures.items()):
        print(f"failed: {name}: {reason}", file=sys.stderr)
    if shard:
        write_manifest(own, manifest | {"failures": failures})
        merged = merge_shards(args.out, run, shard[1])
        if isinstance(merged, list):
            print(f"Shard {shard[0]} of {shard[1]} is done. " +
                  (f"Not yet done: {', '.join(map(str, merged))}. The last one writes manifest.json and splits.json."
                   if own.exists() else "Another shard has merged all of them."))
            return 0
        manifest, failures = merged
    manifest["raw"] = portable(args.raw)  # where an evaluation finds the truth
    splits = finish(args.out, manifest, failures, **division)
    report(manifest, failures, splits, found, args.out)
    return 3 if failures else 0


def choose_shard(text: str | None) -> tuple[int, int] | None:
    """(index, count) of --shard or of torchrun's environment; None where one process does everything."""
    text = text or f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}"
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(f"--shard (or RANK/WORLD_SIZE) {text}: expected I/N with I from 0 to N-1, such as 0/4.")
    return (int(index), int(count)) if int(count) > 1 else None


def refuse_full_disk(args, count: int):
    voxels = args.size**3 if args.size else NATIVE_MM3 / args.spacing**3
    needed = count * voxels * (4 * 2 + 1 if args.compact else 4 * 4 + 8)
    free = shutil.disk_usage(args.out).free
    if needed > free:
        raise InputError(f"{args.out}: {count} cases need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free. "
                         "Try --compact, or another disk.")


def report(manifest: dict, failures: dict[str, str], splits: dict | None, cases, out: Path):
    written = [manifest["cases"][case.name] for case in cases if case.name in manifest["cases"]]
    print(f"{len(written)} cases in {out} ({sum(entry['bytes'] for entry in written) / 1e9:.2f} GB), "
          f"{len(failures)} failed" + (f": see {out / 'failures.csv'}" if failures else "."))
    if splits:
        print(f"Split by patient: {len(splits['train'])} train, {len(splits['validation'])} validation, "
              f"{len(splits['test'])} test cases, {len(splits['folds'])} folds: {out / 'splits.json'}")


if __name__ == "__main__":
    cli.run(main)
