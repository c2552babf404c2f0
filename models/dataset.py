"""Preprocessed cases: their splits, where they are kept, and batches of them on the device that trains."""

import hashlib
import json
import random
import shutil
import time
import warnings
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from models.brats import MODALITIES, patient_of
from models.device import decided_once, free_memory_bytes, processes_here, rank
from models.errors import InputError, InputWarning
from models.interruption import ignore_signals
from models.manifest import join_patients
from models.memory import free_ram_bytes
from models.patches import crop, tumour_voxels
from models.records import MANIFEST, SPLITS, read_json
from models.tensors import load_case

SHARED_MEMORY = Path("/dev/shm")  # worker processes hand over what they read through it (Linux)
PREFETCH = 2  # batches that each worker reads ahead


# ---- sizes ---------------------------------------------------------------------------------------------------------


def input_size(data: Path, split: dict[str, list[str]], patch: int | None = None) -> list[int]:
    """The size [D, H, W] in voxels of what a network is trained on: the one that all cases of a split share or, with
    `patch`, that of the cubes cut from them.

    InputError for a case that is missing, damaged or without label, for cases of several sizes without `patch`, and for
    a patch that is larger than every case.
    """
    if patch is None and preprocessing_of_cases(data)["size"] is None:
        raise InputError(f"{data}: its cases keep their own sizes (--size native). Give --patch, such as --patch 128.")
    sizes = {}
    for name in split["train"] + split["validation"] + split["test"]:
        path = data / f"{name}.pt"
        case = load_case(path, as_stored=True)
        if "label" not in case:
            raise InputError(f"{path}: has no label, so it cannot be trained on. Preprocess {data} again.")
        sizes[tuple(case["image"].shape[1:])] = path
    largest = max(map(max, sizes))
    if patch and patch > largest:
        raise InputError(f"--patch {patch}: no case in {data} has more than {largest} voxels along an axis. Choose a "
                         "smaller patch.")  # fmt: skip
    if patch:
        return [patch] * 3
    if len(sizes) > 1:
        (a, first), (b, second) = list(sizes.items())[:2]
        raise InputError(f"{first} is {a} and {second} is {b}. Preprocess all cases with one --size.")
    return list(next(iter(sizes)))


# ---- splits --------------------------------------------------------------------------------------------------------


def read_split(data: str | Path, fold: int | str | None = None) -> dict[str, list[str]]:
    """Case names of `train`, `validation` and `test` of a preprocessed folder; with `fold`, those of that fold; for the
    fold "all", everything that is not for testing, both to train and to validate on."""
    path = Path(data) / "splits.json"
    if not path.is_file():
        if Path(data, "manifest.json").is_file():
            raise InputError(
                f"{data}: no splits.json: the preprocessing has not finished, or there were too few cases to split "
                "(labelled patients to train, to validate and to test are needed). Run preprocess_brats.py again."
            )
        raise InputError(f"{data}: no preprocessed cases here. Make them with preprocess_brats.py.")
    splits = read_json(path, SPLITS)
    if not splits["train"]:
        raise InputError(f"{path}: has no case to train on. Run preprocess_brats.py again.")
    if fold is None:
        return {name: splits[name] for name in ("train", "validation", "test")}
    if fold == "all":
        both = splits["train"] + splits["validation"]
        return {"train": both, "validation": both, "test": splits["test"]}
    if fold >= len(splits["folds"]):
        raise InputError(f"--fold {fold}: {path} has the folds 0 to {len(splits['folds']) - 1}.")
    return {**splits["folds"][fold], "test": splits["test"]}


def refuse_leaks(data: str | Path, split: dict[str, list[str]]):
    """InputError where a test patient is also trained or validated on, under whatever name; a warning where one is in
    both training and validation. preprocess_brats.py makes no such splits, but they can be edited."""
    known = read_manifest(data)["cases"]
    join_patients(known)
    patients = {part: {known.get(name, {}).get("patient", patient_of(name)): name for name in names}
                for part, names in split.items()}  # fmt: skip
    for part, other in (("test", "train"), ("test", "validation"), ("validation", "train")):
        if not (shared := sorted(patients[part].keys() & patients[other].keys())):
            continue
        count, first = len(shared), shared[0]
        text = (f"{data}/splits.json: {count} patient{'s' * (count > 1)} of its {part} cases "
                f"{'are' if count > 1 else 'is'} in {other} as well, such as that of {patients[part][first]} and "
                f"{patients[other][first]}")  # fmt: skip
        if part == "test":
            raise InputError(f"{text}. The scores would mean nothing. Run preprocess_brats.py again for a new split.")
        warnings.warn(InputWarning(text, "the best epoch is chosen by cases that it was trained on"), stacklevel=2)


def manifest_checksum(data: str | Path) -> str:
    """What identifies a preprocessed data set: the SHA-256 over its settings and its cases' checksums."""
    manifest = read_manifest(data)
    # The checksum of version 1 was a SHA-256.
    sums = {name: entry.get("crc32") or entry.get("sha256") for name, entry in manifest["cases"].items()}
    # Before there was a choice of "normalize", the settings did not name it: the same data keep their checksum.
    settings = {k: value for k, value in manifest["settings"].items() if (k, value) != ("normalize", "percentile")}
    identity = [settings, sums]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def preprocessing_of_cases(data: str | Path) -> dict:
    """How the cases of a data set were made, as arguments of `preprocessing.to_network`: size (of the cube in voxels,
    None for the crop as it is), spacing_mm, normalize."""
    settings = {"normalize": "percentile"} | read_manifest(data)["settings"]
    return {key: settings[key] for key in ("size", "spacing_mm", "normalize")}


def read_manifest(data: str | Path) -> dict:
    """manifest.json of a preprocessed folder; InputError where there is none."""
    path = Path(data) / "manifest.json"
    if not path.is_file():
        raise InputError(f"{path}: missing. Name a folder made by preprocess_brats.py.")
    return read_json(path, MANIFEST)


# ---- where the cases are kept --------------------------------------------------------------------------------------


def choose_input(
    data: Path, names: list[str], cache: str, workers: int, batch_size: int, patch: int | None, device: torch.device
) -> tuple[str, int]:
    """--cache without "auto" for the cases of these names, and as many of the --workers as there is shared memory for.
    Raises InputError for a cache that does not fit. Call it before any process takes memory."""

    def decide():
        images = (load_case(data / f"{name}.pt", as_stored=True)["image"] for name in names)
        case_bytes = [image.nbytes + image[0].numel() for image in images]  # every label is kept as uint8
        batch_bytes = batch_size * max(case_bytes)
        if patch:
            image = load_case(data / f"{names[0]}.pt", as_stored=True)["image"]
            patch_bytes = patch**3 * (len(MODALITIES) * image.element_size() + 1)
            batch_bytes = max(batch_size * patch_bytes, max(case_bytes))  # a whole case is validated on at a time
        return choose_cache(cache, case_bytes, patch is None, device), choose_workers(workers, batch_bytes)

    return decided_once(decide)


def choose_cache(choice: str, case_bytes: list[int], pinned: bool, device: torch.device) -> str:
    """Where cases of these sizes are kept: "device", "ram" or "disk", printed in one line. Raises InputError if
    `choice` is not "auto" and too small. `pinned` says whether RAM beside a GPU is pinned."""
    count, needed = len(case_bytes), sum(case_bytes)
    memory = {"ram": (needed * processes_here(), free_ram_bytes())}  # every process keeps its own copy
    if device.type == "cuda":
        # Pinned memory comes in blocks of a power of two.
        in_ram = sum(2 ** (size - 1).bit_length() for size in case_bytes) if pinned else needed
        memory = {"device": (needed, free_memory_bytes(device)), "ram": (in_ram * processes_here(), free_ram_bytes())}
    elif choice == "device":
        choice = "ram"
    # Half, because the training takes memory, too.
    fitting = [cache for cache, (needed, free) in memory.items() if needed < free / 2] + ["disk"]
    if choice == "auto":
        choice = fitting[0]
    needed, free = memory.get(choice, memory["ram"])
    if choice != "disk" and needed > free:
        raise InputError(f"--cache {choice}: {count} cases take {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB "
                         f"are free. Use --cache {fitting[0]}.")
    print(f"cache: {choice} ({count} cases, {needed / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free)")
    return choice


def choose_workers(wanted: int, batch_bytes: int) -> int:
    """The number of workers for which the shared memory holds what they read ahead and the batch in use, `wanted` at
    most: with one too many, they die of a bus error."""
    if not SHARED_MEMORY.exists():
        return wanted
    free = shutil.disk_usage(SHARED_MEMORY).free
    batches_that_fit = free // (batch_bytes * processes_here())
    workers = max(0, min(wanted, (batches_that_fit - 1) // PREFETCH))
    if workers < wanted:
        print(f"--workers {workers}: {SHARED_MEMORY} has {free / 2**20:.0f} MiB free, too little for what {wanted} "
              f"workers read ahead, {PREFETCH} batches of {batch_bytes / 2**20:.0f} MiB each.")
    return workers


# ---- batches -------------------------------------------------------------------------------------------------------


class Cases(Dataset):
    """Labelled cases: image [4, D, H, W] as stored and label uint8 [1, D, H, W], by index; by (index, box), the part of
    them in the box, [low, high) along each axis. `cache` says where they are kept: "device", "ram" (pinned with `pin`,
    if the device is a GPU) or "disk", from which they, or nothing but the box, are read each time."""

    def __init__(self, data: str | Path, names: list[str], cache: str, device: torch.device, pin: bool = True):
        self.paths = [Path(data) / f"{name}.pt" for name in names]
        self.batches_need_pinning = device.type == "cuda" and (cache == "disk" or (cache == "ram" and not pin))
        self.kept = []
        if cache == "disk":
            return
        for index in tqdm(range(len(names)), "reading", unit="case", leave=False, disable=rank() != 0):
            case = _copies(*self._mapped(index, checked=True))
            if device.type == "cuda" and not self.batches_need_pinning:
                case = tuple(part.to(device) if cache == "device" else part.pin_memory() for part in case)
            self.kept.append(case)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key: int | tuple[int, list[tuple[int, int]]]) -> tuple[torch.Tensor, torch.Tensor]:
        index, box = key if isinstance(key, tuple) else (key, None)
        parts = self.kept[index] if self.kept else self._mapped(index)
        if box:
            parts = [crop(part, box) for part in parts]
        return tuple(part.contiguous() for part in parts) if self.kept else _copies(*parts)

    @cached_property
    def outlines(self) -> list[tuple[torch.Size, torch.Tensor]]:
        """Shape [D, H, W] and tumour voxels of each case, to choose patches by; of a case on disk the label is read."""
        labels = (self.label(index) for index in tqdm(range(len(self)), "looking for tumours", unit="case",
                                                      leave=False, disable=rank() != 0))  # fmt: skip
        return [(label.shape[1:], tumour_voxels(label)) for label in labels]

    def label(self, index: int) -> torch.Tensor:
        """The label [1, D, H, W] alone, of any integer type."""
        return (self.kept[index] if self.kept else self._mapped(index))[1]

    def _mapped(self, index: int, checked: bool = False):
        """Image and label of a file, mapped into memory: only what is used is read, unless all is to be `checked`."""
        case = load_case(self.paths[index], as_stored=True, checked=checked)
        if "label" not in case:
            raise InputError(f"{self.paths[index]}: has no label, so it cannot be trained on or scored.")
        return case["image"], case["label"]


def _copies(image, label):
    """Copies, for which the file is read now; a label takes 2 MB as uint8 and 16 MB as int64."""
    return image.clone(), label.to(torch.uint8, copy=True)


def epoch_order(count: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1) -> list[int]:
    """The shuffled case indices that one process trains on in one epoch. All processes get equally many, at least one
    (the first cases are repeated where the number does not divide), because they wait for one another."""
    order = list(range(count))
    random.Random(f"{seed}-{epoch}").shuffle(order)
    share = -(-count // world_size)
    return list(islice(cycle(order), rank, share * world_size, world_size))


def batches(cases: Cases, order: list, batch_size: int, device: torch.device, workers: int):
    """Yield (B images, B labels, seconds waited): what `cases` has for the keys in `order`, on `device`. They are in
    lists rather than stacked, so that they are copied only once, when their type is converted as well.

    Workers read the next batches, and a GPU copies from pinned memory, while the device still computes on this one.
    """
    loader = DataLoader(
        cases,
        batch_size=batch_size,
        sampler=order,
        num_workers=0 if cases.kept else workers,
        prefetch_factor=PREFETCH if workers and not cases.kept else None,
        worker_init_fn=_leave_signals_to_the_main_process,
        generator=torch.Generator(),  # or it would draw from the one that a resumed epoch has to find as it was
        collate_fn=list,
        pin_memory=cases.batches_need_pinning,
    )
    iterator = iter(loader)
    while True:
        start = time.perf_counter()
        batch = _next_batch(iterator)
        if batch is None:
            return
        images, labels = ([part.to(device, non_blocking=True) for part in parts] for parts in zip(*batch, strict=True))
        yield images, labels, time.perf_counter() - start


def _leave_signals_to_the_main_process(worker: int):
    ignore_signals()  # Ctrl-C and Slurm send them to workers, too, but the training finishes its step and saves


def _next_batch(iterator) -> list | None:
    """The next batch; None after the last one. InputError, in one line, for what ended a worker."""
    try:
        return next(iterator, None)
    except InputError as error:  # of a worker: its traceback and, in the last line, the message
        raise InputError(str(error).strip().splitlines()[-1].removeprefix("models.errors.InputError: ")) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError("a process that reads the cases was killed, most likely for lack of memory. Lower --workers, "
                         "and go on with --resume if there is a last.pt.") from None  # fmt: skip
