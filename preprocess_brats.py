#!/usr/bin/env python3
"""Turn raw BraTS cases (NIfTI) into tensors (.pt) once, so that training never waits for a file format.

Per case: reorient to RAS, resample to 1 mm, each modality to 0-1, crop to the head, resize to a cube, labels to 0-3.
A case that is done with the same settings is skipped, so an interrupted run goes on where it stopped.

  python preprocess_brats.py data/BraTS2021_Training_Data data/preprocessed_tensors
  python preprocess_brats.py RAW OUT --compact --workers 8    (19 MB a case instead of 50)
  python preprocess_brats.py RAW OUT --limit 8 --size 64      (a first look, in a minute on any computer)
"""

import csv
import io
import json
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from models import cli

VERSION = 1  # of the preprocessing itself: raise it when the same settings would give other tensors
MANIFEST_EVERY_S = 2.0  # between two writings of the manifest: what a killed run has to do again


def arguments():
    parser = cli.parser(__doc__)
    parser.add_argument("raw", nargs="?", type=Path, default=Path("data/BraTS2021_Training_Data"), metavar="RAW",
                        help="folder with the raw cases, in any BraTS or MSD Task01 layout")
    parser.add_argument("out", nargs="?", type=Path, default=Path("data/preprocessed_tensors"), metavar="OUT",
                        help="folder for the tensors, manifest.json and splits.json")
    parser.add_argument("--size", type=cli.positive_int, default=128, help="side of the cube in voxels")
    parser.add_argument("--spacing", type=cli.positive_float, default=1.0, help="voxel size in mm before the crop")
    parser.add_argument("--labels", choices=("brats2021", "brats2023", "brats2024", "msd"),
                        help="what the raw label values mean, where the file names do not tell")
    parser.add_argument("--workers", type=cli.positive_int, default=os.cpu_count(),
                        help="processes; each takes less than 1 GiB of memory")
    parser.add_argument("--compact", action="store_true", help="store float16 and uint8: 19 MB a case instead of 50")
    parser.add_argument("--limit", type=cli.positive_int, help="take only the first N cases")
    parser.add_argument("--seed", type=cli.natural, default=0, help="of the split into train, validation and test")
    parser.add_argument("--folds", type=cli.positive_int, default=5, help="cross-validation folds")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    from models.brats import InputError, find_cases

    cases = find_cases(args.raw)[: args.limit]
    schemes = describe(cases, args.raw, args.labels)
    settings = {"version": VERSION, "size": args.size, "spacing_mm": args.spacing, "compact": args.compact}
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{args.out}: cannot be made ({error.strerror}). Choose another OUT.") from None
    manifest = read_manifest(args.out, settings)
    todo = [case for case in cases if not is_done(case, schemes[case.layout], manifest, args.out)]
    refuse_full_disk(args, len(todo))
    print(f"{len(cases) - len(todo)} cases are done already, {len(todo)} to do with {args.workers} workers.")
    failures = process(todo, schemes, settings, manifest, args) if todo else {}
    write_results(manifest, failures, cases, args)
    return 1 if failures else 0


def describe(cases, raw: Path, override: str | None) -> dict[str, str]:
    """Say what was found; returns the label scheme of each layout."""
    from models.brats import LABEL_SCHEMES, LABELS, LAYOUTS

    schemes = {}
    for layout in sorted({case.layout for case in cases}):
        scheme = schemes[layout] = override or layout
        names = {0: "background", **LABELS}
        values = ", ".join(f"{raw_value} = {names[value]}" for raw_value, value in LABEL_SCHEMES[scheme].items())
        members = [case for case in cases if case.layout == layout]
        unlabelled = sum(not case.labelled for case in members)
        print(f"{raw}: {len(members)} cases, {LAYOUTS[layout]}; labels {scheme}: {values}"
              + (f"; {unlabelled} without segmentation" if unlabelled else ""))
    return schemes


# ---- one case ------------------------------------------------------------------------------------------------------


def start_worker():
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer
    torch.set_num_threads(1)  # the workers share the cores among themselves


def process_case(case, scheme: str, out: Path, settings: dict) -> dict:
    """Read, transform and save one case; returns its entry in the manifest."""
    from models.brats import MODALITIES, read_case, to_training_labels
    from models.dataset import save_case
    from models.preprocessing import to_network

    volumes = read_case(case)
    label = volumes.label
    if label is not None:
        label = to_training_labels(label, scheme, case.files["seg"][0])
    result = to_network(volumes.image, label, volumes.affine, settings["size"], settings["spacing_mm"])
    result |= {"case": case.name, "modalities": list(MODALITIES), "label_scheme": scheme}
    path = out / f"{case.name}.pt"
    return {
        "sha256": save_case(path, result, settings["compact"]),
        "bytes": path.stat().st_size,
        "patient": case.patient,
        "labelled": case.labelled,
        "label_scheme": scheme,
        "sources": source_sizes(case),
    }


def source_sizes(case) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in case.source_files}


def is_done(case, scheme: str, manifest: dict, out: Path) -> bool:
    entry = manifest["cases"].get(case.name)
    if entry is None or entry["label_scheme"] != scheme or entry["sources"] != source_sizes(case):
        return False
    path = out / f"{case.name}.pt"
    return path.is_file() and path.stat().st_size == entry["bytes"]


# ---- all cases -----------------------------------------------------------------------------------------------------


def process(todo, schemes: dict, settings: dict, manifest: dict, args) -> dict[str, str]:
    """Process the cases in parallel, filling the manifest; returns case -> reason for those that failed."""
    from tqdm import tqdm

    from models.brats import InputError

    failures, written = {}, time.monotonic()
    # "spawn" starts clean interpreters on every platform; a fork would copy the locks of numerical libraries
    with ProcessPoolExecutor(min(args.workers, len(todo)), get_context("spawn"), start_worker) as pool:
        running = {pool.submit(process_case, case, schemes[case.layout], args.out, settings): case for case in todo}
        try:
            for future in tqdm(as_completed(running), total=len(todo), unit="case"):
                case = running[future]
                try:
                    manifest["cases"][case.name] = future.result()
                except BrokenProcessPool:
                    raise InputError(
                        "a worker was killed, most likely for lack of memory. Lower --workers and run the same "
                        "command again: what is done stays done."
                    ) from None
                except Exception as error:  # one bad case must not cost the other thousand
                    text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
                    failures[case.name] = " ".join(text.split())
                    manifest["cases"].pop(case.name, None)
                    (args.out / f"{case.name}.pt").unlink(missing_ok=True)  # of an earlier run with other settings
                if time.monotonic() - written > MANIFEST_EVERY_S:
                    write_manifest(args.out, manifest)
                    written = time.monotonic()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            write_manifest(args.out, manifest)
    return failures


def read_manifest(out: Path, settings: dict) -> dict:
    """The manifest of an earlier run with the same settings, or an empty one."""
    path = out / "manifest.json"
    empty = {"settings": settings, "versions": versions(), "cases": {}}
    if not path.is_file():
        return empty
    try:
        manifest = json.loads(path.read_text())
        if manifest["settings"] != settings:
            return empty
        kept = {name: entry for name, entry in manifest["cases"].items() if (out / f"{name}.pt").is_file()}
        return {**manifest, "cases": kept}
    except (json.JSONDecodeError, KeyError, TypeError):
        print(f"{path} cannot be read: every case is made again.", file=sys.stderr)
        return empty


def write_manifest(out: Path, manifest: dict):
    from models.brats import write_atomically

    manifest["cases"] = dict(sorted(manifest["cases"].items()))
    write_atomically(out / "manifest.json", json.dumps(manifest, indent=1))


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "numpy", "nibabel")}


def refuse_full_disk(args, count: int):
    from models.brats import InputError

    needed = count * args.size**3 * (4 * 2 + 1 if args.compact else 4 * 4 + 8)
    free = shutil.disk_usage(args.out).free
    if needed > free:
        raise InputError(f"{args.out}: {count} cases need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free. "
                         "Try --compact, or another disk.")


def write_results(manifest: dict, failures: dict[str, str], cases, args):
    """splits.json, failures.csv, and the closing lines."""
    from models.brats import InputError, write_atomically
    from models.dataset import make_splits

    failures_csv = args.out / "failures.csv"
    failures_csv.unlink(missing_ok=True)
    if failures:
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([("case", "reason"), *sorted(failures.items())])
        write_atomically(failures_csv, table.getvalue())
        for case, reason in sorted(failures.items()):
            print(f"failed: {case}: {reason}", file=sys.stderr)
    written = [manifest["cases"][case.name] for case in cases if case.name in manifest["cases"]]
    print(f"{len(written)} cases in {args.out} ({sum(entry['bytes'] for entry in written) / 1e9:.2f} GB), "
          f"{len(failures)} failed" + (f": see {failures_csv}" if failures else "."))
    patients = {name: entry["patient"] for name, entry in manifest["cases"].items() if entry["labelled"]}
    try:
        splits = make_splits(patients, args.seed, args.folds)
    except InputError as error:
        (args.out / "splits.json").unlink(missing_ok=True)
        print(f"No splits.json: {error}")
        return
    write_atomically(args.out / "splits.json", json.dumps(splits, indent=1))
    print(f"Split by patient: {len(splits['train'])} train, {len(splits['validation'])} validation, "
          f"{len(splits['test'])} test cases, {len(splits['folds'])} folds: {args.out / 'splits.json'}")


if __name__ == "__main__":
    cli.run(main)
