"""Preprocessed cases: the `.pt` file, the splits, and batches on the device that trains.

A `.pt` file is a dict that `torch.load(path, weights_only=True)` reads; README.md lists its keys.
"""

import hashlib
import json
import os
import random
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from models.brats import MODALITIES, InputError

KEYS = ("image", "case", "modalities", "label_scheme", "geometry", "normalization")


# ---- one case ------------------------------------------------------------------------------------------------------


def save_case(path: Path, case: dict, compact: bool) -> str:
    """Write a preprocessed case; `compact` stores float16 and uint8. Returns the SHA-256 of the file."""
    stored = dict(case)
    if compact:
        stored["image"] = case["image"].half()
        if "label" in case:
            stored["label"] = case["label"].to(torch.uint8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as file:  # given a path, torch would write the temporary name into the file
            torch.save(stored, file)
            file.seek(0)
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return checksum


def load_case(path: str | Path, as_stored: bool = False) -> dict:
    """A preprocessed case with `image` float32 [4, D, H, W] and, where there is one, `label` int64 [1, D, H, W];
    `as_stored` leaves the types of the file. Raises InputError for anything that is not such a file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file. Make it with preprocess_brats.py.")
    try:
        # Memory-mapped: what is not touched is not read, and several processes share the pages.
        case = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError and more for a bad file
        reason = " ".join(str(error).split())[:80]
        raise InputError(f"{path}: damaged or no file of preprocess_brats.py ({reason}). Make it again.") from None
    missing = [key for key in KEYS if key not in case] if isinstance(case, dict) else ["image"]
    if missing:
        raise InputError(f"{path}: not a preprocessed case (no {missing[0]!r}). Make it with preprocess_brats.py.")
    if tuple(case["modalities"]) != MODALITIES:
        raise InputError(f"{path}: channels {tuple(case['modalities'])}, expected {MODALITIES}. Preprocess again.")
    image, label = case["image"], case.get("label")
    if image.ndim != 4 or len(image) != len(MODALITIES) or (label is not None and label.shape[1:] != image.shape[1:]):
        raise InputError(f"{path}: image {tuple(image.shape)} is not [4, D, H, W] with a label to match.")
    if not as_stored:
        case["image"] = image.float()
        if label is not None:
            case["label"] = label.long()
    return case


# ---- splits --------------------------------------------------------------------------------------------------------


def read_split(data: str | Path, fold: int | None = None) -> dict[str, list[str]]:
    """Case names of `train`, `validation` and `test` of a preprocessed folder; with `fold`, those of that fold."""
    path = Path(data) / "splits.json"
    if not path.is_file():
        if Path(data, "manifest.json").is_file():
            raise InputError(f"{data}: too few cases to split: preprocess 3 labelled patients or more.")
        raise InputError(f"{data}: no preprocessed cases here. Make them with preprocess_brats.py.")
    splits = json.loads(path.read_text())
    if fold is None:
        return {name: splits[name] for name in ("train", "validation", "test")}
    if fold >= len(splits["folds"]):
        raise InputError(f"--fold {fold}: {path} has the folds 0 to {len(splits['folds']) - 1}.")
    return {**splits["folds"][fold], "test": splits["test"]}


def manifest_checksum(data: str | Path) -> str:
    """What identifies a preprocessed data set: the SHA-256 over its settings and its cases' checksums."""
    manifest = _manifest(data)
    identity = [manifest["settings"], {name: entry["sha256"] for name, entry in manifest["cases"].items()}]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def spacing_of_cases(data: str | Path) -> float:
    """The --spacing that a data set was preprocessed with, in mm."""
    return _manifest(data)["settings"]["spacing_mm"]


def _manifest(data: str | Path) -> dict:
    path = Path(data) / "manifest.json"
    if not path.is_file():
        raise InputError(f"{path}: missing. Preprocess again with preprocess_brats.py.")
    return json.loads(path.read_text())


# ---- batches -------------------------------------------------------------------------------------------------------


class Cases(Dataset):
    """Labelled cases by index, as stored; with `cached`, read once and kept in memory."""

    def __init__(self, data: str | Path, names: list[str], cached: bool):
        self.paths = [Path(data) / f"{name}.pt" for name in names]
        self.cache = [self._read(index) for index in range(len(names))] if cached else None

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cache[index] if self.cache else self._read(index)

    def _read(self, index: int):
        case = load_case(self.paths[index], as_stored=True)
        if "label" not in case:
            raise InputError(f"{self.paths[index]}: has no label, so it cannot be trained on or scored.")
        # clone() reads the file now; a label takes 2 MB as uint8 and 16 MB as int64
        return case["image"].clone(), case["label"].to(torch.uint8)


def fits_in_memory(data: str | Path, names: list[str], copies: int) -> bool:
    """Whether these cases, kept by each of `copies` processes, take less than half of the memory that is free now
    (False where that cannot be told)."""
    wanted = copies * sum(Path(data, f"{name}.pt").stat().st_size for name in names)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return False
    available_kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return wanted < available_kib * 1024 / 2


def epoch_order(count: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1) -> list[int]:
    """The shuffled case indices that one process trains on in one epoch. Every process gets as many (the first cases
    come again where it does not divide), or the others would wait for it for ever."""
    order = list(range(count))
    random.Random(f"{seed}-{epoch}").shuffle(order)
    order += order[: -count % world_size]
    return order[rank::world_size]


def batches(cases: Cases, order: list[int], batch_size: int, device: torch.device, workers: int):
    """Yield (image float32 [B, 4, D, H, W], label int64 [B, 1, D, H, W], seconds waited) on `device`.

    The next batch is fetched and copied while the device still computes on this one: nothing here waits for it.
    """
    loader = DataLoader(
        cases,
        batch_size=batch_size,
        sampler=order,
        num_workers=0 if cases.cache else workers,
        pin_memory=device.type == "cuda",
    )
    iterator = iter(loader)
    while True:
        start = time.perf_counter()
        batch = next(iterator, None)
        if batch is None:
            return
        image, label = (part.to(device, non_blocking=True) for part in batch)
        yield image.float(), label.long(), time.perf_counter() - start
