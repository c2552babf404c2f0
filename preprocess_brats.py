#!/usr/bin/env python3
"""Turn raw BraTS cases (NIfTI) into tensors (.pt) once, so that training never waits for a file format.

Per case: reorient to RAS, resample to 1 mm, each modality to 0-1 (or z-scores), crop to the head, resize to a cube,
labels to 0-3.
A case that is done with the same settings is skipped, so an interrupted run goes on where it stopped.

  python preprocess_brats.py data/BraTS2021_Training_Data data/preprocessed_tensors
  python preprocess_brats.py RAW OUT --compact --workers 8    (19 MB a case instead of 50)
  python preprocess_brats.py RAW OUT --shard 0/4              (a quarter of the cases; the others elsewhere)
  python preprocess_brats.py RAW OUT --limit 8 --size 64      (a first look, in a minute on any computer)
"""

import os
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path

from models import cli

VERSION = 2  # of the preprocessing itself: raise it when the same settings would give other tensors
MANIFEST_EVERY_S = 2.0  # between two writings of the manifest: what a killed run has to do again
MANIFEST_SHARE = 0.02  # of the time, at most, goes into writing it: the larger it is, the less often


def arguments():
    parser = cli.parser(__doc__)
    parser.add_argument("raw", nargs="?", type=Path, default=Path("data/BraTS2021_Training_Data"), metavar="RAW",
                        help="folder with the raw cases, in any BraTS or MSD Task01 layout")
    parser.add_argument("out", nargs="?", type=Path, default=Path("data/preprocessed_tensors"), metavar="OUT",
                        help="folder for the tensors, manifest.json and splits.json")
    parser.add_argument("--size", type=cli.positive_int, default=128, help="side of the cube in voxels")
    parser.add_argument("--spacing", type=cli.positive_float, default=1.0, help="voxel size in mm before the crop")
    parser.add_argument("--normalize", choices=("percentile", "zscore"), default="percentile",
                        help="each modality to 0-1 between two percentiles of its non-zero voxels, or to mean 0 and "
                             "standard deviation 1 over these")
    parser.add_argument("--labels", choices=("brats2021", "brats2023", "brats2024", "msd"),
                        help="what the raw label values mean, where the file names do not say")
    parser.add_argument("--workers", type=cli.positive_int, default=usable_cpus(),
                        help="processes; each takes less than 0.6 GiB of memory")
    parser.add_argument("--compact", action="store_true", help="store float16 and uint8: 19 MB a case instead of 50")
    parser.add_argument("--limit", type=cli.positive_int, help="take only the first N cases")
    parser.add_argument("--shard", metavar="I/N", help="do only every N-th case from the I-th on, counted from 0; the "
                        "last shard to finish merges them (default: RANK and WORLD_SIZE of torchrun)")
    parser.add_argument("--seed", type=cli.natural, default=0, help="of the split into train, validation and test")
    parser.add_argument("--folds", type=cli.positive_int, default=5, help="cross-validation folds")
    return parser.parse_args()


def usable_cpus() -> int:
    """Those that this process may use, shared with the processes that torchrun started beside it."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def main() -> int:
    args = arguments()
    from models.brats import find_cases
    from models.errors import InputError
    from models.manifest import claim, finish, manifest_path, merge_shards, open_manifest, write_manifest

    shard = choose_shard(args.shard)
    found = find_cases(args.raw)[: args.limit]
    schemes = describe(found, args.raw, args.labels)
    settings = {"version": VERSION, "size": args.size, "spacing_mm": args.spacing, "compact": args.compact,
                "normalize": args.normalize}  # fmt: skip
    run = {"settings": settings, "cases": len(found), "labels": schemes, "seed": args.seed, "folds": args.folds}
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{args.out}: cannot be made ({error.strerror}). Choose another OUT.") from None
    cases = found[shard[0] :: shard[1]] if shard else found
    manifest = open_manifest(args.out, run, [case.name for case in cases], shard)
    todo = [case for case in cases if not is_done(case, schemes[case.layout], manifest)]
    refuse_full_disk(args, len(todo))
    claim(args.out, run, manifest, shard)
    print((f"Shard {shard[0]} of {shard[1]}: " if shard else "")
          + f"{len(cases) - len(todo)} cases are done already, {len(todo)} to do with {args.workers} workers.")
    failures = process(todo, schemes, settings, manifest, manifest_path(args.out, shard), args) if todo else {}
    for name, reason in sorted(failures.items()):
        print(f"failed: {name}: {reason}", file=sys.stderr)
    if shard:
        write_manifest(manifest_path(args.out, shard), manifest | {"failures": failures})
        merged = merge_shards(args.out, run, shard[1])
        if isinstance(merged, list):
            print(f"Shard {shard[0]} of {shard[1]} is done and waits for nothing. " +
                  (f"Not yet done: {', '.join(map(str, merged))}. The last one writes manifest.json and splits.json."
                   if manifest_path(args.out, shard).exists() else "Another has put all of them together."))
            return 0
        manifest, failures = merged
    splits = finish(args.out, manifest, failures, args.seed, args.folds)
    report(manifest, failures, splits, found, args.out)
    return 3 if failures else 0


def choose_shard(text: str | None) -> tuple[int, int] | None:
    """(index, count) of --shard or of torchrun's environment; None where one process does everything."""
    from models.errors import InputError

    text = text or f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}"
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(f"--shard (or RANK/WORLD_SIZE) {text}: expected I/N with I from 0 to N-1, such as 0/4.")
    return (int(index), int(count)) if int(count) > 1 else None


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
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # the workers share the cores among themselves


def end_with_parent():
    parent_process().join()  # where it was killed, nobody else ends this one
    os._exit(1)


def process_case(case, scheme: str, out: Path, settings: dict) -> dict:
    """Read, transform and save one case; returns its entry in the manifest."""
    from models.brats import MODALITIES, read_case, to_training_labels
    from models.dataset import save_case
    from models.preprocessing import to_network

    volumes = read_case(case)
    label = volumes.label
    if label is not None:
        label = to_training_labels(label, scheme, case.files["seg"][0])
    kept = {key: settings[key] for key in ("size", "spacing_mm", "normalize")}
    result = to_network(volumes.image, label, volumes.affine, **kept)
    result |= {"case": case.name, "modalities": list(MODALITIES), "label_scheme": scheme}
    path = out / f"{case.name}.pt"
    return {
        "crc32": save_case(path, result, settings["compact"]),
        "bytes": path.stat().st_size,
        "patient": case.patient,
        "labelled": case.labelled,
        "label_scheme": scheme,
        "sources": source_sizes(case),
    }


def source_sizes(case) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in case.source_files}


def is_done(case, scheme: str, manifest: dict) -> bool:
    entry = manifest["cases"].get(case.name)
    return entry is not None and entry["label_scheme"] == scheme and entry["sources"] == source_sizes(case)


# ---- all cases -----------------------------------------------------------------------------------------------------


def process(todo, schemes: dict, settings: dict, manifest: dict, manifest_file: Path, args) -> dict[str, str]:
    """Process the cases in parallel, filling the manifest; returns case -> reason for those that failed."""
    from tqdm import tqdm

    from models.errors import InputError
    from models.manifest import write_manifest

    workers = min(args.workers, len(todo))
    failures, running, waiting, next_writing = {}, {}, iter(todo), time.monotonic() + MANIFEST_EVERY_S
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Slurm and torchrun stop a process with it
    # "spawn" starts clean interpreters on every platform; a fork would copy the locks of numerical libraries
    pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker)
    progress = tqdm(total=len(todo), unit="case")
    try:
        while True:
            # A few ahead of the workers, not all: a future holds its case and its result as long as it lives.
            for case in islice(waiting, 2 * workers - len(running)):
                running[submit(pool, case, schemes[case.layout], args.out, settings)] = case.name
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                try:
                    manifest["cases"][name] = future.result()
                except BrokenProcessPool:
                    raise InputError(
                        "a worker was killed, most likely for lack of memory. Lower --workers and run the same "
                        "command again: what is done stays done."
                    ) from None
                except Exception as error:  # one bad case must not cost the other thousand
                    text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
                    failures[name] = " ".join(text.split())
                    manifest["cases"].pop(name, None)
                    (args.out / f"{name}.pt").unlink(missing_ok=True)  # of an earlier run with other settings
                progress.update()
            if (start := time.monotonic()) > next_writing:
                write_manifest(manifest_file, manifest)
                end = time.monotonic()
                next_writing = end + max(MANIFEST_EVERY_S, (end - start) / MANIFEST_SHARE)
    except BaseException:
        stop(pool, args.out)
        raise
    finally:
        progress.close()
        write_manifest(manifest_file, manifest)
    pool.shutdown()
    return failures


def submit(pool, *arguments):
    """A worker that starts here is deaf to Ctrl-C from its first moment, not only once it has imported everything."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return pool.submit(process_case, *arguments)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(process_case, *arguments)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def stop(pool, out: Path):
    """End the workers where they are, and remove what they were writing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # one Ctrl-C is enough, and a second must not end this half-way
    workers = active_children()
    pool.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
        for temporary in out.glob(f".*.{worker.pid}.tmp"):
            temporary.unlink(missing_ok=True)


def refuse_full_disk(args, count: int):
    from models.errors import InputError

    needed = count * args.size**3 * (4 * 2 + 1 if args.compact else 4 * 4 + 8)
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
