"""Broken and hostile inputs of every script: what is printed, the exit status, what is left behind, and the memory.

Each kind is a command line over files that are not as they should be, and the words that its one line has to contain. A
kind that begins with "valid" has to work. All run in one process, on a copy of the code in a temporary folder.

    python tests/bad_inputs.py [WORD ...]      (those with a word in their names; without, all, and the table is kept)
"""

import contextlib
import csv
import io
import json
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests/benchmarks/results/bad_inputs.csv"
LIMIT_MIB = 400  # that a kind may take above what the libraries took before
LIMIT_S = 300  # on a machine that does much else
FOUND_LATE = ("a changed bit in every kilobyte", "an optimizer of another network")  # config.json is written by then
VIEWER, PREPROCESS, UNET, SWIN, EVALUATE, BENCHMARK = (
    "view_interactive_4pane_brats.py", "preprocess_brats.py", "train_unet.py", "train_swinunetr.py", "evaluate.py",
    "benchmark_inference.py")  # fmt: skip


@dataclass
class Tried:
    """What came of one kind; `wrong` is empty where all was as it should be."""

    script: str
    kind: str
    status: object
    message: str
    peak_mib: float
    wrong: str


def all_kinds() -> list[tuple]:
    """(script, name, arguments after it, words, status) of every kind, in an order in which they can run."""
    from bad_cases import raw_kinds, raw_nifti_kinds
    from bad_files import run_kinds, tensor_kinds

    return [*raw_nifti_kinds(), *raw_kinds(), *tensor_kinds(), *run_kinds()]


def try_kind(script: str, kind: str, make, words: str, box: Path) -> Tried:
    """Run a script in this process, in the folder `box`, which `make(box)` fills and gets the arguments from."""
    import torch

    from models.device import peak_memory_gib, reset_peak_memory

    cpu = torch.device("cpu")
    box.mkdir(parents=True)
    arguments = [str(argument) for argument in make(box)]
    before, stderr, stdout = contents(), io.StringIO(), io.TextIOWrapper(io.BytesIO())
    status, argv = 0, sys.argv
    reset_peak_memory(cpu)
    start_gib = peak_memory_gib(cpu)
    signal.alarm(LIMIT_S)
    try:
        sys.argv = [script, *arguments]
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        status, stderr = 1, io.StringIO(traceback.format_exc())
    finally:
        signal.alarm(0)
        sys.argv = argv
    peak_mib = (peak_memory_gib(cpu) - start_gib) * 1024
    lines = [line for line in stderr.getvalue().splitlines() if line.strip() and "%|" not in line]  # but for progress
    if any(line.startswith("usage: ") for line in lines):
        lines = lines[-1:]
    message = " ".join(lines[-1:]).replace(str(Path.cwd()), ".")
    wrong = []
    if kind.startswith("valid"):
        wrong += [f"status {status}"] * (status != 0)
    else:
        wrong += [f"status {status}"] * (status != 2) + [f"{len(lines)} lines"] * (len(lines) != 1)
        changed = sorted(name for name, stamp in contents().items() if before.get(name) != stamp)
        if kind.endswith(FOUND_LATE):
            changed = [name for name in changed if not name.endswith("config.json")]
        wrong += [f"changed {changed[:3]}"] * bool(changed)
    wrong += [f"does not say {words!r}"] * (words not in message + stdout_text(stdout))
    wrong += [f"{peak_mib:.0f} MiB"] * (peak_mib > LIMIT_MIB)
    if wrong and lines:
        print(*lines[-12:], sep="\n")
    return Tried(script, kind, status, message, peak_mib, "; ".join(wrong))


def stdout_text(stdout: io.TextIOWrapper) -> str:
    stdout.flush()
    return stdout.buffer.getvalue().decode(errors="replace")


def contents() -> dict[str, tuple]:
    """Every file of the sandbox -> its size, and when it was written. An empty folder does no harm."""
    found = {}
    for folder, subfolders, names in os.walk("."):
        subfolders[:] = [name for name in subfolders if name not in ("__pycache__", ".engines")]
        for name in names:
            path = os.path.join(folder, name)
            stat = os.lstat(path)
            found[path] = (stat.st_size, stat.st_mtime_ns)
    return found


def try_all(words: list[str]) -> list[Tried]:
    """Every kind (or those with one of the words in its name), in the working directory."""
    import torch

    torch.set_num_threads(1)
    tried = []
    for script, kind, make, expected in all_kinds():
        if words and not any(word in f"{script} {kind}" for word in words):
            continue
        box = Path("boxes") / f"{len(tried):03d}"
        tried.append(try_kind(script, kind, make, expected, box))
        print(f"{'WRONG' if tried[-1].wrong else 'ok   '} {script:34} {kind:45} {tried[-1].status} "
              f"{tried[-1].peak_mib:4.0f} MiB  {tried[-1].message[:150]} {tried[-1].wrong}", flush=True)  # fmt: skip
    return tried


def main() -> int:
    if os.environ.get("BAD_INPUTS_SANDBOX"):
        tried = try_all(sys.argv[1:])
        rows = [{"script": one.script, "kind": one.kind, "status": one.status, "message": one.message[:200],
                 "peak_mib": round(one.peak_mib)} for one in tried]  # fmt: skip
        wrong = [f"{one.script}, {one.kind}: {one.wrong}" for one in tried if one.wrong]
        Path("tried.json").write_text(json.dumps({"rows": rows, "wrong": wrong}))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        outcome = in_sandbox(Path(folder), sys.argv[1:])
    print(f"{len(outcome['rows'])} kinds, {len(outcome['wrong'])} of them wrong.")
    if not sys.argv[1:]:
        sys.path.insert(0, str(ROOT))
        from models.files import git_commit

        rows = [row | {"commit": git_commit()} for row in outcome["rows"]]
        with RESULTS.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return int(bool(outcome["wrong"]))


def in_sandbox(folder: Path, words: list[str]) -> dict:
    """Try the kinds in a process of its own on a copy of the code in `folder`; the rows, and what is wrong."""
    from conftest import copy_of_the_code

    copy_of_the_code(folder)
    for name in ("bad_inputs.py", "bad_cases.py", "bad_files.py", "conftest.py"):
        shutil.copy2(ROOT / "tests" / name, folder)
    address_space = 12 * 2**30  # bytes; the libraries take five
    subprocess.run(
        [sys.executable, "bad_inputs.py", *words],
        cwd=folder,
        env=os.environ | {"BAD_INPUTS_SANDBOX": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space)),
        check=True,
    )
    return json.loads((folder / "tried.json").read_text())


if __name__ == "__main__":
    sys.exit(main())
