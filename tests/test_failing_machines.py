"""A disk that is full or cannot be written to, a file that goes away, a process that is killed: each for real."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import RUN, copy_of_the_code, read, run_script, write_raw_case

from models.dataset import SHARED_MEMORY
from models.tensors import load_case

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="needs mounts and /proc")]
NETWORK = ["--variant", "space-to-depth", "--channels", 4, 8, "--convolutions", 1, 1, "--amp", "off"]


@pytest.fixture
def disk(tmp_path):
    """A function that makes a disk of so many bytes in a folder; `read_only` it cannot be written to."""
    mounted = []

    def mount(folder: Path, size: int, read_only: bool = False) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        flags = ["-o", f"size={size}" + (",ro" if read_only else "")]
        done = subprocess.run(["mount", "-t", "tmpfs", *flags, "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip("may not mount a disk here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path, leave: int = 0):
    """Take the space of a disk, but for so many bytes."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    with suppress(OSError):  # the script writes meanwhile, too
        (folder / "filler").write_bytes(bytes(max(0, free - leave)))


def start(script, *arguments, cwd):
    copy_of_the_code(cwd)
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end_of(process, status: int) -> str:
    """What it said in its last line on stderr, one that is not of a progress bar."""
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == status, stderr
    assert "Traceback" not in stderr, stderr
    lines = [line for line in re.split(r"[\r\n]", stderr) if "error: " in line]
    assert len(lines) == 1, stderr
    return lines[0]


def wait_until(process, condition):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def workers_of(process) -> list[int]:
    """The processes that it has spawned or forked, without those that look after others."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children
            if "resource_tracker" not in Path(f"/proc/{child}/cmdline").read_text()]  # fmt: skip


def temporaries(folder: Path) -> list[Path]:
    return list(folder.glob(".*.tmp"))


# ---- a full disk ---------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_ends_a_preprocessing_whose_cases_are_whole(raw, tmp_path, disk):
    out = disk(tmp_path / "out", 2**24)
    process = start("preprocess_brats.py", raw, "out", "--size", 32, "--workers", 1, cwd=tmp_path)
    wait_until(process, lambda: list(out.glob("*.pt")))
    fill(out, leave=10**6)
    assert "No space left" in end_of(process, 2)
    assert not temporaries(out) and not (out / "splits.json").exists()
    for path in out.glob("*.pt"):
        load_case(path)
    (out / "filler").unlink()
    run_script("preprocess_brats.py", raw, "out", "--size", 32, cwd=tmp_path)
    assert len(list(out.glob("*.pt"))) == 12


@pytest.mark.parametrize(("size", "left"), [(10, set()), (30, {"best.pt"})])
def test_a_disk_that_has_no_space_for_a_checkpoint_ends_a_training(tensors, tmp_path, disk, size, left):
    """best.pt takes 19 MB, last.pt three times as much."""
    disk(tmp_path / "models/unet/results", size * 2**20)
    flags = ["--epochs", 2, "--run-name", "full", "--amp", "off"]
    message = end_of(start("train_unet.py", tensors, *flags, cwd=tmp_path), 2)
    assert "No space left" in message and (".pt: cannot be written" in message)
    run = tmp_path / "models/unet/results/full"
    assert {path.name for path in run.glob("*.pt")} == left and not temporaries(run)


def test_a_disk_that_has_no_space_for_the_scores_ends_an_evaluation(trained, tmp_path, disk):
    out = disk(tmp_path / "out", 2**14)
    assert "No space left" in end_of(start("evaluate.py", RUN, "--out", out, "--engine", "eager", cwd=trained), 2)
    assert not temporaries(out)


def test_a_disk_that_has_no_space_for_a_picture_gets_none(raw, tmp_path, disk):
    out = disk(tmp_path / "out", 2**14)
    flags = [raw / "BraTS2021_00000", "--save", out / "x.png"]
    assert "No space left" in end_of(start("view_interactive_4pane_brats.py", *flags, cwd=tmp_path), 2)
    assert not list(out.iterdir())


# ---- a disk that cannot be written to ------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_to_is_told_before_the_work_starts(raw, trained, tensors, tmp_path, disk):
    out = disk(tmp_path / "out", 2**20, read_only=True)
    commands = [
        ("preprocess_brats.py", raw, out, "--size", 16),
        ("evaluate.py", RUN, "--out", out / "scores"),
        ("evaluate.py", RUN, "--out", tmp_path / "scores", "--save-nifti", out),
        ("view_interactive_4pane_brats.py", raw / "BraTS2021_00000", "--save", out / "x.png"),
        ("benchmark_inference.py", "--models", "unet", "--size", 32, "--out", out),
    ]
    for command in commands:
        message = end_of(start(*command, cwd=trained), 2)
        assert str(out) in message and "Read-only file system" in message, message
    disk(tmp_path / "models/unet/results", 2**20, read_only=True)
    message = end_of(start("train_unet.py", tensors, "--run-name", "x", *NETWORK, cwd=tmp_path), 2)
    assert "models/unet/results/x: Read-only file system" in message


# ---- a file that goes away -----------------------------------------------------------------------------------------


def test_a_raw_file_that_goes_away_costs_one_case(tmp_path):
    for index in range(6):
        write_raw_case(tmp_path / "raw", f"C{index}", seed=index)
    process = start("preprocess_brats.py", "raw", "out", "--size", 16, "--workers", 1, cwd=tmp_path)
    wait_until(process, (tmp_path / "out").exists)  # the cases are found by then, and a worker takes seconds to start
    time.sleep(0.3)
    (tmp_path / "raw/C5/C5_t2.nii.gz").unlink()
    process.communicate(timeout=300)
    assert process.returncode == 3
    (failure,) = read(tmp_path / "out/failures.csv")
    assert failure["case"] == "C5" and "No such file" in failure["reason"]
    assert len(list((tmp_path / "out").glob("*.pt"))) == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_a_case_that_goes_away_ends_a_training_that_reads_it_from_the_disk(tensors, tmp_path, workers):
    data = tmp_path / "data"
    data.mkdir()
    for path in tensors.iterdir():
        os.link(path, data / path.name)
    flags = [*NETWORK, "--cache", "disk", "--workers", workers, "--epochs", 500, "--run-name", "x"]
    process = start("train_unet.py", "data", *flags, cwd=tmp_path)
    wait_until(process, (tmp_path / "models/unet/results/x/last.pt").exists)
    lost = next(data.glob("*.pt"))
    for path in data.glob("*.pt"):
        path.unlink()
    message = end_of(process, 2)
    assert "no such file" in message and lost.suffix in message
    assert not temporaries(tmp_path / "models/unet/results/x")


# ---- a process that is killed --------------------------------------------------------------------------------------


def test_a_killed_worker_ends_a_preprocessing_and_what_is_done_stays_done(raw, tmp_path):
    process = start("preprocess_brats.py", raw, "out", "--size", 96, "--workers", 1, cwd=tmp_path)
    wait_until(process, lambda: list(tmp_path.glob("out/*.pt")))
    os.kill(workers_of(process)[0], signal.SIGKILL)
    assert "a worker was killed" in end_of(process, 2)
    assert not temporaries(tmp_path / "out") and not (tmp_path / "out/splits.json").exists()
    again = run_script("preprocess_brats.py", raw, "out", "--size", 96, cwd=tmp_path)
    assert re.search(r"[1-9]\d* cases are done already", again.stdout)


def test_a_killed_worker_ends_a_training(tensors, tmp_path):
    flags = [*NETWORK, "--cache", "disk", "--workers", 1, "--epochs", 500, "--run-name", "x"]
    process = start("train_unet.py", tensors, *flags, cwd=tmp_path)
    last = tmp_path / "models/unet/results/x/last.pt"
    wait_until(process, last.exists)
    wait_until(process, lambda: workers_of(process))
    os.kill(workers_of(process)[0], signal.SIGKILL)
    assert "a process that reads the cases was killed" in end_of(process, 2)
    assert not temporaries(last.parent)


def test_a_killed_process_that_scores_ends_an_evaluation(tmp_path):
    maps = tmp_path / "maps"
    maps.mkdir()
    for index in range(24):
        folder, _, _ = write_raw_case(tmp_path / "raw", f"C{index:02d}", seed=0, shape=(80, 80, 80))
        os.link(folder / f"C{index:02d}_seg.nii.gz", maps / f"C{index:02d}.nii.gz")
    flags = ["--predictions", maps, "--raw", tmp_path / "raw", "--out", tmp_path / "out", "--workers", 2]
    process = start("evaluate.py", *flags, cwd=tmp_path)
    wait_until(process, lambda: len(workers_of(process)) == 2)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    assert "a scoring process was killed" in end_of(process, 2)
    assert not (tmp_path / "out/per_case.csv").exists()


# ---- little shared memory ------------------------------------------------------------------------------------------


def test_a_megabyte_of_shared_memory_is_enough_for_a_training_from_the_disk(tensors, tmp_path):
    copy_of_the_code(tmp_path)
    flags = [*NETWORK, "--cache", "disk", "--workers", 2, "--epochs", 1, "--run-name", "x"]
    train = " ".join(map(str, [sys.executable, "train_unet.py", tensors, *flags]))
    command = f"mount -t tmpfs -o size=1m tmpfs {SHARED_MEMORY} && {train}"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    if "permission" in done.stderr.lower() or "unshare" in done.stderr:
        pytest.skip("may not mount a disk here")
    assert done.returncode == 0, done.stderr
    assert "--workers 0" in done.stdout and "Trained in" in done.stdout
