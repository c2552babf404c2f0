"""From predicted cases to scores and files, in processes of their own beside the one that runs the networks.

Volumes are released as soon as they have been scored: a thousand cases take the memory of a few.
"""

import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import one_hot

from models.brats import LABELS
from models.errors import InputError
from models.labels import to_raw_labels
from models.metrics import confusion, dice_per_target, score_case
from models.nifti import write_label_nifti
from models.preprocessing import native_label_map

AHEAD = 2  # cases that may be waiting for each process


@dataclass(frozen=True)
class Job:
    """A predicted case, to be scored. All label maps are training labels uint8."""

    case: str
    space: str
    prediction: np.ndarray  # in `space`
    truth: np.ndarray | None  # in `space`
    spacing_mm: list[float]  # along the axes of these
    panel: bytes  # its picture, a JPEG
    shown: np.ndarray  # the prediction [D, H, W] with RAS axes, for other pictures
    run: str = ""
    trained_on: bool = False
    geometry: dict | None = None
    network_truth: np.ndarray | None = None  # [D, H, W]; the way back from network space is scored as well
    native: np.ndarray | None = None  # the prediction [X, Y, Z]
    nifti: Path | None = None  # where that is to be written
    scheme: str = ""  # of the label values in it
    seconds: float | None = None  # of the networks
    reliability: np.ndarray | None = None  # see statistics.reliability_counts


@dataclass(frozen=True)
class Scored:
    """What is kept of a case; nothing of it has the size of a volume."""

    run: str
    case: str
    rows: list[dict]  # of per_case.csv
    panel: bytes
    packed: bytes  # the prediction with RAS axes: see `unpack`
    seconds: float | None
    reliability: np.ndarray | None


def scored(jobs: Iterator[Job], processes: int) -> Iterator[Scored]:
    """Yield `score(job)` for each job, in their order."""
    if processes < 2:
        yield from map(score, jobs)
        return
    # "spawn": a fork would copy the locks of numerical libraries.
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        waiting = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(score, job))
                if len(waiting) > AHEAD * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise InputError("a scoring process was killed, most likely for lack of memory. Lower --workers.") from None


def score(job: Job) -> Scored:
    """Score one predicted case, and write its label map."""
    rows = []
    if job.truth is not None:
        ceiling = {} if job.network_truth is None else ceiling_dice(job)
        for target, columns in score_case(job.prediction, job.truth, job.spacing_mm).items():
            keys = {"run": job.run, "case": job.case, "space": job.space, "target": target}
            rows.append(keys | columns | {"ceiling_dice": ceiling.get(target), "trained_on": job.trained_on})
    if job.nifti:
        write_label_nifti(job.nifti, to_raw_labels(job.native, job.scheme), np.array(job.geometry["affine"]))
    return Scored(job.run, job.case, rows, job.panel, pack(job.shown), job.seconds, job.reliability)


def ceiling_dice(job: Job) -> dict[str, float]:
    """target -> Dice of the truth itself after the way to network space and back, the best that a prediction can
    get."""
    certain = one_hot(torch.from_numpy(job.network_truth).long(), len(LABELS) + 1)  # [D, H, W, 4]
    certain = certain.movedim(-1, 0).float()
    back = native_label_map(certain, job.geometry)
    return dice_per_target(confusion(back, torch.from_numpy(job.truth)))


def pack(label: np.ndarray) -> bytes:
    """A label map [D, H, W] compressed to about a hundredth of its size."""
    shape = np.array(label.shape, np.int64).tobytes()
    return zlib.compress(shape + np.ascontiguousarray(label, np.uint8).tobytes(), 1)


def unpack(packed: bytes) -> np.ndarray:
    """The label map uint8 [D, H, W] that `pack` has packed."""
    content = zlib.decompress(packed)
    return np.frombuffer(content, np.uint8, offset=24).reshape(np.frombuffer(content, np.int64, 3))
