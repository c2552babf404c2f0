"""Preprocessing of all cases of a cohort: in parallel, with an entry in the manifest for each that is done.

The process that hands out the cases does not import torch, only its workers do: if everything is done already, or a
flag is wrong, nobody waits for it.
"""

import math
import os
import signal
import threading
import time
import warnings
import zlib
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import islice
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path

import numpy as np
from tqdm import tqdm

from models.brats import MODALITIES, SCHEME_USERS, describe_scheme
from models.cases import LAYOUTS, Case, scheme_of
from models.errors import InputError, InputWarning, OutputError
from models.files import remove_temporaries
from models.interruption import SIGNALS, ignore_signals, raise_on_signals
from models.labels import to_training_labels
from models.manifest import write_manifest
from models.memory import free_ram_bytes
from models.nifti import read_grid, to_ras
from models.volumes import Volumes, read_case

# Of a worker: torch and the other libraries; for each voxel of a file that fits int16, of others, and in the tensor.
WORKER_BYTES, SMALL_BYTES, LARGE_BYTES, NETWORK_BYTES = 3.2e8, 18, 44, 28
MANIFEST_EVERY_S = 2.0  # between two writings of the manifest: what a killed run has to do again
MANIFEST_SHARE = 0.02  # of the time, at most, goes into writing it: the larger it is, the less often


def describe(cases: list[Case], raw: Path) -> dict[str, int]:
    """Print what was found; returns the label schemes and how many cases have each. Raises InputError if the meaning of
    a case's label values is unknown."""
    kinds = {}
    for case in cases:
        kinds.setdefault((case.layout, scheme_of(case)), []).append(case)
    for (layout, scheme), members in sorted(kinds.items()):
        unlabelled, plural = sum(not case.labelled for case in members), "s" * (len(members) > 1)
        print(f"{raw}: {len(members)} case{plural}, {LAYOUTS[layout]}; labels {scheme} ({SCHEME_USERS[scheme]}): "
              f"{describe_scheme(scheme)}" + (f"; {unlabelled} without segmentation" if unlabelled else ""))
    return dict(Counter(map(scheme_of, cases)))


# ---- memory --------------------------------------------------------------------------------------------------------


def fitting_workers(todo: list[Case], settings: dict, wanted: int) -> int:
    """The number of workers for which there is memory if each has the largest case: at least one, `wanted` at most."""
    largest, free = max((memory_bytes(case, settings) for case in todo), default=0), free_ram_bytes()
    if not wanted * largest > free:  # nan where the system does not say
        return wanted
    workers = max(1, min(wanted, int(free / largest)))
    print(f"--workers {workers}: {free / 2**30:.1f} GiB of memory are free, and the largest case may take a worker "
          f"{largest / 2**30:.1f} GiB.")
    return workers


def memory_bytes(case: Case, settings: dict) -> float:
    """The most memory that a worker takes for a case, estimated from its first file; 0 if that cannot be read."""
    try:
        shape, dtype, affine = read_grid(case.source_files[0])
    except InputError:  # reported when the case is read
        return 0
    voxels = math.prod(shape[:3])
    resampled = voxels * abs(np.linalg.det(affine[:3, :3])) / settings["spacing_mm"] ** 3
    in_network = settings["size"] ** 3 if settings["size"] else resampled
    of_types = SMALL_BYTES if np.can_cast(dtype, np.int16) else LARGE_BYTES
    return WORKER_BYTES + of_types * voxels + 4 * resampled + NETWORK_BYTES * in_network


# ---- one case ------------------------------------------------------------------------------------------------------


def start_worker():
    import torch  # here and below, for the workers alone

    ignore_signals()  # the main process answers them
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # the workers share the cores among themselves


def end_with_parent():
    parent_process().join()  # if it was killed, nobody else ends this process
    os._exit(1)


def process_case(case: Case, out: Path, settings: dict) -> dict:
    """Read, transform and save one case; returns its entry in the manifest."""
    from models.preprocessing import to_network  # imports torch
    from models.tensors import save_case  # imports torch

    scheme = scheme_of(case)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", InputWarning)
        volumes = read_case(case)
        label = volumes.label
        if label is not None:
            label = to_training_labels(label, scheme, case.files["seg"][0])
        arguments = {key: settings[key] for key in ("size", "spacing_mm", "normalize")}
        result = to_network(volumes.image, label, volumes.affine, **arguments)
    result |= {"case": case.name, "modalities": list(MODALITIES), "label_scheme": scheme}
    path = out / f"{case.name}.pt"
    return {
        "crc32": save_case(path, result, settings["compact"]),
        "bytes": path.stat().st_size,
        "patient": case.patient,
        "labelled": case.labelled,
        "label_scheme": scheme,
        "sources": source_sizes(case),
        "fingerprint": fingerprint(volumes),
        "warnings": warnings_by_text(case.name, caught),
    }


def fingerprint(volumes: Volumes) -> str:
    """The CRC-32 of the middle axial slice of all modalities: the same for the same scans, whatever they are called,
    in whatever axis order and number type they are stored. "" for an empty slice."""
    image = to_ras(volumes.image, volumes.affine)
    middle = np.ascontiguousarray(image[..., image.shape[3] // 2], np.float32)  # [4, D, H]
    return f"{zlib.crc32(middle):08x}" if middle.any() else ""


def warnings_by_text(name: str, caught: list[warnings.WarningMessage]) -> dict[str, str]:
    """Text of a warning -> the files or modalities of the case that it is about."""
    about = {}
    for message in (record.message for record in caught if record.category is InputWarning):
        about.setdefault(message.args[1], []).append(message.args[0].removeprefix(f"{name}: "))
    return {text: ", ".join(subjects) for text, subjects in about.items()}


def source_sizes(case: Case) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in case.source_files}


def is_done(case: Case, manifest: dict) -> bool:
    entry = manifest["cases"].get(case.name)
    return entry is not None and entry["label_scheme"] == scheme_of(case) and entry["sources"] == source_sizes(case)


# ---- all cases -----------------------------------------------------------------------------------------------------


def process(todo: list[Case], settings: dict, out: Path, workers: int, manifest: dict, file: Path) -> dict[str, str]:
    """Process the cases and enter them in the manifest, which is written to `file` now and then and at the end, also of
    an interrupted run; returns case -> reason for those that failed."""
    workers = min(workers, len(todo))
    failures, running, waiting, next_writing = {}, {}, iter(todo), time.monotonic() + MANIFEST_EVERY_S
    raise_on_signals(once=True)
    # "spawn" starts clean interpreters on every platform; a fork would copy the locks of numerical libraries
    pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker)
    progress = tqdm(total=len(todo), unit="case")
    try:
        while True:
            # A few ahead of the workers, not all: a future holds its case and its result as long as it lives.
            for case in islice(waiting, 2 * workers - len(running)):
                running[submit(pool, case, out, settings)] = case.name
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                try:
                    manifest["cases"][name] = future.result()
                except (BrokenProcessPool, OutputError):
                    raise
                except Exception as error:  # one bad case must not cost the other thousand
                    text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
                    failures[name] = " ".join(text.split())
                    manifest["cases"].pop(name, None)
                    (out / f"{name}.pt").unlink(missing_ok=True)  # of an earlier run with other settings
                progress.update()
            if (start := time.monotonic()) > next_writing:
                write_manifest(file, manifest)
                end = time.monotonic()
                next_writing = end + max(MANIFEST_EVERY_S, (end - start) / MANIFEST_SHARE)
    except BaseException as error:
        stop(pool, out)
        with suppress(OutputError):  # a full disk has been reported already
            write_manifest(file, manifest, durable=False)  # nobody waits for a busy disk after Ctrl-C
        if isinstance(error, BrokenProcessPool):
            raise InputError("a worker was killed, most likely for lack of memory. Lower --workers and run the same "
                             "command again: what is done stays done.") from None  # fmt: skip
        raise
    finally:
        progress.close()
    write_manifest(file, manifest)
    pool.shutdown()
    return failures


def submit(pool, *arguments):
    """Submit a case; a worker started by this ignores signals from the beginning, not only after its imports."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return pool.submit(process_case, *arguments)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return pool.submit(process_case, *arguments)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def stop(pool, out: Path):
    """Kill the workers, and remove the files that they were writing."""
    workers = active_children()
    pool.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
        remove_temporaries(out, f"*.{worker.pid}")
