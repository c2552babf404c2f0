"""Random changes to small files, guided by the code that they reach, for every reader of NIfTI and `.pt` files.

A reader may return or raise InputError; anything else is a finding: another exception, a RuntimeWarning, 2 GiB of
memory or 10 s. The seeds are in corpus/, what atheris makes of them stays in a temporary folder.

    pip install atheris
    python tests/fuzz_readers.py nifti --minutes 10      (or case, tensor, checkpoint)
    python tests/fuzz_readers.py --write-corpus
"""

import argparse
import gzip
import io
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from contextlib import suppress
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "tests/corpus"
RESULTS = ROOT / "tests/benchmarks/results/fuzz.csv"
READERS = ("nifti", "case", "tensor", "checkpoint")
LARGEST_FILE = 8192  # bytes
AS_FILE, AS_PART = 0, 1  # the first byte of an input: the rest is a file, or what is to be wrapped in one


# ---- what is tried -------------------------------------------------------------------------------------------------


def reader_of(name: str):
    """A function that takes the bytes of a file and reads it, or raises InputError."""
    from models.brats import MODALITIES  # here and below: atheris has to see how a module is imported
    from models.cases import Case
    from models.errors import InputError
    from models.labels import to_training_labels
    from models.nifti import read_label, read_nifti
    from models.preprocessing import to_network
    from models.runs import load_checkpoint
    from models.tensors import load_case
    from models.volumes import read_case

    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))

    def nifti(path):
        read_nifti(path)
        read_label(path)

    def case(path):
        volumes = read_case(Case("C", "brats2021", dict.fromkeys((*MODALITIES, "seg"), (path,))))
        label = to_training_labels(volumes.label, "brats2021")
        to_network(volumes.image, label, volumes.affine, size=8)

    read = {"nifti": nifti, "case": case, "tensor": load_case, "checkpoint": load_checkpoint}[name]
    wrap = gzip.compress if name in ("nifti", "case") else in_archive
    path = folder / ("file.nii.gz" if name in ("nifti", "case") else "file.pt")

    def try_one(data: bytes):
        path.write_bytes(wrap(data[1:]) if data[:1] == bytes([AS_PART]) else data[1:])
        with warnings.catch_warnings(), suppress(InputError):
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", RuntimeWarning)
            read(path)

    return try_one


def in_archive(pickled: bytes) -> bytes:
    """The `.pt` file whose pickle this is, with one storage of zeros: its checksums are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in (("data.pkl", pickled), ("byteorder", b"little"), ("data/0", bytes(256)),
                              ("data/1", bytes(256)), ("version", b"3\n")):  # fmt: skip
            archive.writestr(f"file/{name}", content)
    return buffer.getvalue()


def fuzz(name: str, arguments: list[str]):
    """Never returns: libFuzzer ends the process."""
    import atheris  # an optional package
    import torch._weights_only_unpickler as unpickling  # all of torch would take minutes to instrument

    sys.path.insert(0, str(ROOT))
    unpickling.Unpickler.load = atheris.instrument_func(unpickling.Unpickler.load)
    with atheris.instrument_imports(include=["models", "nibabel"], enable_loader_override=False):
        try_one = reader_of(name)
    atheris.Setup([sys.argv[0], *arguments], try_one)
    atheris.Fuzz()


# ---- one run of it -------------------------------------------------------------------------------------------------


def run(name: str, minutes: float) -> dict:
    """Fuzz for so long; a row of the table. A finding ends it early, and is kept in the working directory."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests/benchmarks")]
    from csv_rows import append_rows

    from models.files import git_commit

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        seeds = shutil.copytree(CORPUS / name, Path(work) / "corpus")
        command = [sys.executable, __file__, name, "--child", str(seeds), f"-max_total_time={round(60 * minutes)}",
                   f"-max_len={LARGEST_FILE}", "-timeout=10", "-rss_limit_mb=2048", "-print_final_stats=1",
                   f"-artifact_prefix=finding-{name}-"]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    executions = re.findall(r"^#(\d+)", done.stdout, re.MULTILINE)  # told as they come; a finding ends without a sum
    said = dict(re.findall(r"stat::(\w+):\s+(\d+)", done.stdout))
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN)
    row = {
        "date": date.today().isoformat(),
        "commit": git_commit(),
        "reader": name,
        "minutes": (time.monotonic() - start) / 60,
        "cpu_minutes": (seconds.ru_utime + seconds.ru_stime) / 60,
        "executions": int(said.get("number_of_executed_units", (executions or [0])[-1])),
        "peak_mib": int(said.get("peak_rss_mb", 0)),
        "findings": int(done.returncode != 0),
    }
    append_rows(RESULTS, [row])
    if done.returncode:
        print(done.stdout[-3000:], file=sys.stderr)
    return row


def write_corpus():
    """The seeds: small files of every reader, whole and as the part that is wrapped."""
    import nibabel
    import numpy as np
    import torch

    sys.path.insert(0, str(ROOT))
    from models.brats import MODALITIES
    from models.preprocessing import to_network
    from models.records import CHECKPOINT_FORMAT
    from models.tensors import save_case

    def write(reader, name, kind, data):
        path = CORPUS / reader / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([kind]) + data)

    voxels = np.zeros((5, 6, 4), np.int16)
    voxels[1:4, 1:5, 1:3] = np.arange(24).reshape(3, 4, 2) % 3
    affine = np.diag([-1.0, -1, 1.5, 1])
    for reader in ("nifti", "case"):
        for dtype in (np.uint8, np.int16, np.float32):
            image = nibabel.Nifti1Image(voxels.astype(dtype), affine)
            image.set_qform(affine, code=1)
            write(reader, f"{np.dtype(dtype)}", AS_FILE, image.to_bytes())
        write(reader, "packed", AS_PART, image.to_bytes())
        write(reader, "gzip", AS_FILE, gzip.compress(image.to_bytes(), mtime=0))
        image.header.set_slope_inter(0.5, 1)
        write(reader, "scaled", AS_FILE, nibabel.Nifti1Image(voxels, affine, image.header).to_bytes())
        big = nibabel.Nifti1Image(voxels, affine, nibabel.Nifti1Header(endianness=">"))
        write(reader, "big-endian", AS_FILE, big.to_bytes())

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.pt"
        case = to_network(np.stack([voxels] * 4), voxels.astype(np.uint8), affine, size=2)
        case |= {"case": "C", "modalities": list(MODALITIES), "label_scheme": "brats2021"}
        model = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
        checkpoint = {"format": CHECKPOINT_FORMAT, "network": "unet", "config": {"channels": [2, 4]}, "epoch": 1,
                      "modalities": list(MODALITIES), "amp": "off", "dice_mean": 0.5, "model": model}  # fmt: skip
        for reader, content in (("tensor", case), ("checkpoint", checkpoint)):
            if reader == "tensor":
                save_case(path, content, compact=True)
            else:
                torch.save(content, path)
            write(reader, "file", AS_FILE, path.read_bytes())
            with zipfile.ZipFile(path) as archive:
                (pickled,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
                write(reader, "pickle", AS_PART, archive.read(pickled))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", nargs="?", choices=READERS)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--write-corpus", action="store_true")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write_corpus:
        write_corpus()
    elif args.child:
        fuzz(args.reader, args.child)
    else:
        for name in [args.reader] if args.reader else READERS:
            print(run(name, args.minutes))


if __name__ == "__main__":
    main()
