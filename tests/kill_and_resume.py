#!/usr/bin/env python3
"""Kill preprocessing and training at random moments, start them again, and compare with runs that nobody disturbed.

  python tests/kill_and_resume.py                                           (30 and 20 kills: half an hour)
  python tests/kill_and_resume.py --minutes 30                              (a soak: again until the time is over)
  python tests/kill_and_resume.py --preprocessing-kills 2 --training-kills 0

A round begins with an empty folder. Its process gets SIGKILL, alone or with its workers, some time after its start and
is started again with the same command, with --resume where there is a last.pt; after up to three kills it may end. Then
all files have to be there, no others, and be equal: tensors, manifest and splits byte for byte; weights, optimiser,
history, train.csv and test scores, but for times and memory, to the last bit. The moments are drawn from --seed between
shortly before the first case, or checkpoint, of the undisturbed run and its end. One row per script goes to the CSV;
the exit status is 1 if anything differed. Needs POSIX signals.
"""

import argparse
import csv
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import torch
from conftest import copy_of_the_code, write_raw_case
from csv_rows import append_rows

from models.device import device_name
from models.files import git_commit

KILLS_A_ROUND = 3
MACHINE = ("seconds", "step_ms", "data_wait_ms", "volumes_per_s", "peak_gib")  # columns that differ from run to run
CSV = Path(__file__).parent / "benchmarks/results/kills.csv"


@dataclass
class Subject:
    """What is killed. Paths are relative to the folder of a round, which has the code, raw cases and tensors."""

    name: str
    command: list[str]
    out: Path
    first: str  # the file, or pattern, whose appearance says that the imports are over
    differences: Callable[[Path, Path], list[str]]  # of two folders `out`


# ---- what is compared ----------------------------------------------------------------------------------------------


def names_that_differ(a: Path, b: Path) -> list[str]:
    return [f"{name}: only once" for name in sorted({p.name for p in a.iterdir()} ^ {p.name for p in b.iterdir()})]


def differences_of_tensors(a: Path, b: Path) -> list[str]:
    return names_that_differ(a, b) or [p.name for p in a.iterdir() if p.read_bytes() != (b / p.name).read_bytes()]


def differences_of_runs(a: Path, b: Path) -> list[str]:
    """config.json, which lists the resumptions, and pictures are only to be there."""
    found = names_that_differ(a, b)
    if found:
        return found
    for name in ("best.pt", "last.pt"):
        first, second = (torch.load(folder / name, weights_only=True) for folder in (a, b))
        found += [f"{name}: {place}" for place in unequal(first, second)]
    for name in ("train.csv", "test_results.csv"):
        first, second = (without_machine(folder / name) for folder in (a, b))
        found += [name] if first != second else []
    split_of = [json.loads((folder / "config.json").read_text())["split"] for folder in (a, b)]
    return found + (["config.json: split"] if split_of[0] != split_of[1] else [])


def without_machine(table: Path) -> list[dict]:
    with table.open(newline="") as file:
        return [{key: value for key, value in row.items() if key not in MACHINE} for row in csv.DictReader(file)]


def unequal(a, b, place: str = "") -> list[str]:
    """Where two nested contents of checkpoints differ."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a if key not in MACHINE for found in unequal(a[key], b[key], f"{place}/{key}")]
    if isinstance(a, list | tuple) and type(a) is type(b) and len(a) == len(b):
        return [found for i, pair in enumerate(zip(a, b, strict=True)) for found in unequal(*pair, f"{place}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [place]
    both_nan = isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    return [] if both_nan or (type(a) is type(b) and a == b) else [place]


# ---- runs ----------------------------------------------------------------------------------------------------------


def command_of(subject: Subject, folder: Path) -> list[str]:
    resume = ["--resume"] if (folder / subject.out / "last.pt").exists() else []
    return [sys.executable, *subject.command, *resume]


def start(subject: Subject, folder: Path, log) -> subprocess.Popen:
    return subprocess.Popen(command_of(subject, folder), cwd=folder, stdout=log, stderr=log, start_new_session=True)


def undisturbed(subject: Subject, folder: Path) -> tuple[float, float]:
    """(seconds until its first file, seconds in all) of a run to the end."""
    begin, first_s = time.monotonic(), None
    with (folder / "log.txt").open("a") as log, start(subject, folder, log) as process:
        while process.poll() is None:
            if first_s is None and any((folder / subject.out).glob(subject.first)):
                first_s = time.monotonic() - begin
            time.sleep(0.02)
    if process.returncode or first_s is None:
        raise SystemExit((folder / "log.txt").read_text())
    return first_s, time.monotonic() - begin


def killed_run(subject: Subject, folder: Path, moments: list[float], whole_group: list[bool]) -> tuple[int, int]:
    """Run it to the end, killed so many seconds after each start; returns how many kills it took and the exit status
    of the start that nobody killed. Kills that came too late do not count."""
    with (folder / "log.txt").open("a") as log:
        for kills, (moment, group) in enumerate(zip(moments, whole_group, strict=True)):
            process = start(subject, folder, log)
            try:
                return kills, process.wait(timeout=moment)
            except subprocess.TimeoutExpired:
                (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
                process.wait()
        return len(moments), start(subject, folder, log).wait()


def kill_often(subject: Subject, workshop: Path, kills: int, rng: random.Random) -> dict:
    """Rounds until there were as many kills; the row of the CSV, and what differed is printed."""
    begin = time.monotonic()
    reference = fresh_folder(workshop, f"{subject.name}-undisturbed")
    first_s, whole_s = undisturbed(subject, reference)
    print(f"{subject.name}: first file after {first_s:.1f} s, all after {whole_s:.1f} s", flush=True)
    done = different = 0
    while done < kills:
        count = min(KILLS_A_ROUND, kills - done)
        folder = fresh_folder(workshop, f"{subject.name}-killed")
        # Each start leaves less to do: most moments lie in the first half of what an undisturbed run takes.
        moments = [rng.triangular(0.8 * first_s, whole_s, first_s + 0.2 * (whole_s - first_s)) for _ in range(count)]
        hits, status = killed_run(subject, folder, moments, [rng.random() < 0.5 for _ in range(count)])
        found = [f"exit status {status}"] if status else subject.differences(reference / subject.out,
                                                                             folder / subject.out)  # fmt: skip
        done += hits
        different += hits if found else 0
        print(f"{subject.name}: {done} kills, {different} with another result {found[:5]}", flush=True)
        if found:
            shutil.copytree(folder, workshop / f"different-{subject.name}-{done}", dirs_exist_ok=True)
    return {"what": subject.name, "kills": done, "survived": done - different, "different": different,
            "minutes": (time.monotonic() - begin) / 60}  # fmt: skip


def fresh_folder(workshop: Path, name: str) -> Path:
    """The folder of a round: the code, and links to the raw cases and tensors of the workshop."""
    folder = workshop / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    copy_of_the_code(folder)
    for shared in ("raw", "tensors"):
        (folder / shared).symlink_to(workshop / shared)
    return folder


def subjects(workshop: Path, cases: int = 24, size: int = 80, epochs: int = 5) -> tuple[Subject, Subject]:
    """Preprocessing of small cases, and a U-Net on them: everything that draws random numbers is on, its steps are
    accumulated, a worker reads the cases, and last.pt is written several times in each epoch."""
    for index in range(cases):
        write_raw_case(workshop / "raw", f"BraTS2021_{index:05d}", seed=index)
    copy_of_the_code(workshop)
    preprocess = ["preprocess_brats.py", "raw", "out", "--workers", "2", "--size", str(size)]
    small = [sys.executable, "preprocess_brats.py", "raw", "tensors", "--size", "32"]
    subprocess.run(small, cwd=workshop, check=True, capture_output=True)
    train = ["train_unet.py", "tensors", "--epochs", str(epochs), "--channels", "4", "8", "16", "32", "64",
             "--accumulate", "2", "--ema", "0.9", "--augmentation", "strong", "--copy-paste", "0.3", "--cache", "disk",
             "--workers", "1", "--amp", "off", "--save-minutes", "0.01", "--run-name", "killed"]  # fmt: skip
    run = Path("models/unet/results/killed")
    return (Subject("preprocess_brats.py", preprocess, Path("out"), "*.pt", differences_of_tensors),
            Subject("train_unet.py", train, run, "last.pt", differences_of_runs))  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preprocessing-kills", type=int, default=30)
    parser.add_argument("--training-kills", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=0, help="begin again until so many are over")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, default=CSV)
    args = parser.parse_args()
    rng, begin, totals = random.Random(args.seed), time.monotonic(), {}
    workshop = Path(tempfile.mkdtemp())
    preprocessing, training = subjects(workshop)
    while not totals or time.monotonic() - begin < 60 * args.minutes:
        for subject, kills in ((preprocessing, args.preprocessing_kills), (training, args.training_kills)):
            if kills:
                row = kill_often(subject, workshop, kills, rng)
                total = totals.setdefault(subject.name, dict.fromkeys(row, 0) | {"what": subject.name})
                total |= {key: total[key] + row[key] for key in row if key != "what"}
    about = {"device": device_name(torch.device("cpu")), "commit": git_commit(), "date": date.today().isoformat()}
    append_rows(args.csv, [row | about for row in totals.values()])
    if any(row["different"] for row in totals.values()):
        print(f"What differed is in {workshop}.")
        return 1
    shutil.rmtree(workshop)
    return 0


if __name__ == "__main__":
    sys.exit(main())
