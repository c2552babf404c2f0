"""Raw cases that are broken or hostile: see bad_inputs.py."""

import gzip
import json
import os
import struct
from functools import cache, partial
from pathlib import Path

import nibabel
import numpy as np
from bad_inputs import BENCHMARK, EVALUATE, PREPROCESS, VIEWER
from conftest import LPS, make_head, write_raw_case

SHAPE = (20, 22, 18)
# Where a NIfTI-1 header has what.
DIM, DATATYPE, VOX_OFFSET, SLOPE, QFORM_CODE, QUATERN, SROW, MAGIC = 40, 70, 108, 112, 252, 256, 280, 344


# ---- one file ------------------------------------------------------------------------------------------------------


@cache
def raw_file(dtype=np.int16) -> bytes:
    """A T1 of SHAPE as a .nii file."""
    image = nibabel.Nifti1Image(make_head(shape=SHAPE)[0]["t1"].astype(dtype), LPS)
    image.set_qform(LPS, code=1)
    return image.to_bytes()


def patched(form: str, place: int, *values, data: bytes | None = None) -> bytes:
    """The file with other values in its header."""
    content = bytearray(data or raw_file())
    struct.pack_into("<" + form, content, place, *values)
    return bytes(content)


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]


def with_voxel(value: float) -> bytes:
    """The T1 as float32, one voxel of which is `value`."""
    return patched("f", 352 + 4 * 1000, value, data=raw_file(np.float32))


def without_sform(data: bytes) -> bytes:
    return patched("hh", QFORM_CODE, 1, 0, data=data)


def nifti_files() -> dict[str, tuple]:
    """Kind -> (file name ending, its bytes, the words)."""
    raw, zipped = raw_file(), gzip.compress(raw_file(), 1)
    huge = patched("7h", DIM + 2, 32767, 32767, 32767, 1, 1, 1, 1)
    promise = patched("7h", DIM + 2, 4000, 4000, 3200, 1, 1, 1, 1)  # 102 GB of int16
    identity = np.eye(4, dtype="<f4")[:3]
    return {
        "absurd dimensions": (".nii", huge, "promises"),
        "absurd dimensions, compressed": (".nii.gz", gzip.compress(huge), "promises"),
        "100 GB promised by a small gzip file": (".nii.gz", gzip.compress(promise + bytes(10**7)), "promises"),
        "a gzip bomb behind whole voxels": (".nii.gz", gzip.compress(raw + bytes(10**8)), ""),
        "negative dimension": (".nii", patched("h", DIM + 2, -5), "shape (-5"),
        "zero dimension": (".nii", patched("h", DIM + 4, 0), "shape"),
        "nine dimensions": (".nii", patched("h", DIM, 9), "not a readable NIfTI file"),
        "no dimension": (".nii", patched("h", DIM, 0), "not a readable NIfTI file"),
        "wrong magic": (".nii", patched("4s", MAGIC, b"xxxx"), "magic"),
        "magic of a pair of files": (".nii", patched("4s", MAGIC, b"ni1\0"), ".img"),
        "NIfTI-2 of zeros": (".nii", struct.pack("<i8s", 540, b"n+2\0\r\n\x1a\n") + bytes(600), "not a readable NIfTI"),
        "truncated header": (".nii", raw[:100], "not a readable NIfTI file"),
        "truncated voxels": (".nii", raw[:-100], "truncated"),
        "truncated gzip": (".nii.gz", zipped[:-500], "truncated or damaged"),
        "gzip without checksum": (".nii.gz", zipped[:-8], "truncated or damaged"),
        "flipped bit in gzip": (".nii.gz", flipped(zipped, len(zipped) // 2), "damaged"),
        "only the first bytes of gzip": (".nii.gz", zipped[:2], "damaged"),
        "flipped bits in the data type": (".nii", patched("h", DATATYPE, 9999), "not a readable NIfTI file"),
        "colours": (".nii", patched("hh", DATATYPE, 128, 24), "colours"),
        "complex numbers": (".nii", patched("hh", DATATYPE, 32, 64), "complex"),
        "voxels far behind the end": (".nii", patched("f", VOX_OFFSET, 2e9), "end too early"),
        "voxels at infinity": (".nii", patched("f", VOX_OFFSET, float("inf")), "not a readable NIfTI file"),
        "voxels at no number": (".nii", patched("f", VOX_OFFSET, float("nan")), "not a readable NIfTI file"),
        "infinite intercept": (".nii", patched("ff", SLOPE, 2, float("inf")), "intercept"),
        "slope that overflows": (".nii", patched("f", SLOPE, 3e38), "absurdly large"),
        "NaN voxel": (".nii", with_voxel(float("nan")), "NaN"),
        "infinite voxel": (".nii", with_voxel(float("inf")), "infinite"),
        "voxel of 1e38": (".nii", with_voxel(1e38), "absurdly large"),
        "all voxels 0": (".nii", raw[:352] + bytes(len(raw) - 352), "every voxel is 0"),
        "all voxels -7": (".nii", raw[:352] + b"\xf9\xff" * ((len(raw) - 352) // 2), "every voxel is -7"),
        "zero affine": (".nii", patched("12f", SROW, *[0] * 12), "singular"),
        "NaN in the affine": (".nii", patched("12f", SROW, *[float("nan")] * 12), "singular"),
        "affine in metres": (".nii", patched("12f", SROW, *(identity / 1000).flat), "no head"),
        "affine in centimetres": (".nii", patched("12f", SROW, *(identity / 10).flat), "no head"),
        "affine in micrometres": (".nii", patched("12f", SROW, *(identity * 1000).flat), "no head"),
        "no rotation": (".nii", without_sform(patched("3f", QUATERN, 9, 9, 9)), "not a readable NIfTI file"),
        "another shape than the other files": (".nii", patched("hh", DIM + 2, 22, 20), "differs from"),
        "four dimensions": (".nii", patched("h4h", DIM, 4, 10, 22, 18, 2), "expected three dimensions"),
        "empty file": (".nii.gz", b"", "ends within its header"),
        "a pointer of Git LFS": (".nii.gz", b"version https://git-lfs.github.com/spec/v1\n", "ends within its header"),
        "a web page": (".nii.gz", b"<!DOCTYPE html><title>404</title>" * 30, "not a readable NIfTI file"),
        "a zip file": (".nii.gz", b"PK\3\4" + bytes(400), "not a readable NIfTI file"),
    }


def label_files() -> dict[str, tuple]:
    """Kind -> (bytes of a segmentation, the words)."""
    label = np.zeros(SHAPE, np.uint8)
    label[8:12, 8:12, 8:12] = 1

    def file(voxels, affine=LPS):
        return nibabel.Nifti1Image(voxels, affine).to_bytes()

    return {
        "label 255": (file(label * 255), "label value 255"),
        "label -1": (file(label.astype(np.int16) * -1), "label value -1"),
        "label 1.5": (file(label * np.float32(1.5)), "whole numbers"),
        "label NaN": (file(label * np.float32("nan")), "whole numbers"),
        "label 1e9": (file(label * np.float32(1e9)), "whole numbers"),
        "a channel for each label": (file(np.stack([label] * 3, -1)), "a label in each voxel"),
        "segmentation of another shape": (file(label[:10]), "differs from"),
        "segmentation elsewhere": (file(label, LPS + np.diag([0, 0, 0.3, 0])), "--same-voxels"),
    }


# ---- cases ---------------------------------------------------------------------------------------------------------


def case_with(box: Path, role: str, ending: str, data: bytes) -> Path:
    """A whole case, one file of which holds these bytes."""
    folder = write_raw_case(box, "C0", shape=SHAPE)[0]
    (folder / f"C0_{role}.nii.gz").unlink()
    (folder / f"C0_{role}{ending}").write_bytes(data)
    return folder


def case_without_file(box: Path, make) -> Path:
    """A whole case, in which `make` puts something else at the path of its T1."""
    folder = write_raw_case(box, "C0", shape=SHAPE)[0]
    path = folder / "C0_t1.nii.gz"
    path.unlink()
    make(path)
    return folder


def sparse(path: Path):
    """A file that promises four terabytes, and has them on a disk that keeps no zeros."""
    header = patched("7h", DIM + 2, 16000, 16000, 8000, 1, 1, 1, 1)
    path.write_bytes(header)
    os.truncate(path, 4 * 2**40 + 2**20)


def valid_files() -> dict[str, bytes]:
    voxels = make_head(shape=SHAPE)[0]["t1"]
    big = nibabel.Nifti1Image(voxels, LPS, nibabel.Nifti1Header(endianness=">"))
    return {
        "valid: big-endian": big.to_bytes(),
        "valid: NIfTI-2": nibabel.Nifti2Image(voxels, LPS).to_bytes(),
        "valid: scl_slope and scl_inter": patched("ff", SLOPE, 0.5, 3.0),
        "valid: vox_offset 0": patched("f", VOX_OFFSET, 0.0),
        "valid: an extension of 2 GB that is not there": patched("4sii", 348, b"\1\0\0\0", 2**31 - 16, 6),
        "valid: a rotation that is none beside a good sform": patched("3f", QUATERN, 9, 9, 9),
    }


def raw_nifti_kinds():
    """A case whose T1 or segmentation is broken, in the viewer: all readers of raw cases are the same."""

    def shown(make):
        return lambda box: [make(box), "--save", box / "picture.png"]

    for kind, (ending, data, words) in nifti_files().items():
        name = kind if words else f"valid: {kind}"
        yield VIEWER, name, shown(partial(case_with, role="t1", ending=ending, data=data)), words
    for kind, (data, words) in label_files().items():
        yield VIEWER, kind, shown(partial(case_with, role="seg", ending=".nii", data=data)), words
    for kind, data in valid_files().items():
        yield VIEWER, kind, shown(partial(case_with, role="t1", ending=".nii", data=data)), ""
    others = {
        "a loop of links": (lambda path: path.symlink_to(path.name), "symbolic links"),
        "a link to nothing": (lambda path: path.symlink_to("nothing"), "No such file"),
        "a folder that is called like a file": (lambda path: path.mkdir(), "no t1 file"),
        "a pipe": (os.mkfifo, "not a file"),
        "more voxels than memory": (lambda path: sparse(path.with_suffix("")), "are free"),
    }
    for kind, (make, words) in others.items():
        yield VIEWER, kind, shown(partial(case_without_file, make=make)), words


# ---- folders -------------------------------------------------------------------------------------------------------


def folder_with(box: Path, name: str, content: bytes) -> Path:
    (box / "raw").mkdir()
    (box / "raw" / name).write_bytes(content)
    return box / "raw"


def raw_kinds():
    """Folders of raw cases that are not what they should be, in stage 2 and wherever raw cases are read."""

    def into(make, *flags):
        return lambda box: [make(box), box / "out", "--workers", 1, *flags]

    def described(content: bytes):
        return into(partial(folder_with, name="dataset.json", content=content))

    def named(name):
        return lambda box: write_raw_case(box / "raw", name, shape=SHAPE)[0].parent

    def file_as_out(box):
        (box / "out").write_text("a file")
        return named("C0")(box)

    def twice(box):
        write_raw_case(box / "raw/a", "C0", shape=SHAPE)
        write_raw_case(box / "raw/b", "C0", shape=SHAPE)
        return box / "raw"

    def foreign_shard(box):
        (box / "out").mkdir()
        (box / "out/manifest-shard-0-of-2.json").write_text(json.dumps(
            {"run": {"settings": {"size": 4}}, "versions": {}, "cases": {}}))  # fmt: skip
        return named("C0")(box)

    channels = {str(number): name for number, name in enumerate(("T1", "T1ce", "T2", "FLAIR"))}
    yield PREPROCESS, "no such folder", into(lambda box: box / "nowhere"), "no such folder"
    yield PREPROCESS, "a name of 5000 letters", into(lambda box: "x" * 5000), "too long"
    yield PREPROCESS, "a name with a zero byte in it", into(lambda box: "x\0y"), ""
    yield PREPROCESS, "a file as RAW", into(partial(folder_with, name="x.nii", content=b"")), "no BraTS case found"
    yield PREPROCESS, "a file as OUT", into(file_as_out), "cannot be written to"
    yield PREPROCESS, "one case twice", into(twice), "is there twice"
    yield PREPROCESS, "a case name with a line break", into(named("C\n0")), "no BraTS case found"
    yield PREPROCESS, "a case name that is not UTF-8", into(named(os.fsdecode(b"C\xff"))), "cannot be shown"
    yield PREPROCESS, "an unknown cohort", into(named("BraTS-XYZ-00001-000")), "--labels"
    yield PREPROCESS, "another shard's flags", into(foreign_shard, "--shard", "1/2"), "other flags"
    yield PREPROCESS, "dataset.json: empty", described(b""), "not the dataset.json"
    yield PREPROCESS, "dataset.json: not UTF-8", described(b"\xff\xfe{"), "not the dataset.json"
    yield PREPROCESS, "dataset.json: a list", described(b"[1]"), "not the dataset.json"
    yield PREPROCESS, "dataset.json: 100,000 brackets", described(b"[" * 10**5), "not the dataset.json"
    yield PREPROCESS, "dataset.json: numbers as names", described(b'{"channel_names": {"0": 1}}'), "not the"
    yield PREPROCESS, "dataset.json: no images", described(json.dumps({"channel_names": channels}).encode()), "no BraTS"
    yield EVALUATE, "label maps: no such folder", lambda box: [
        "--predictions", box / "nowhere", "--raw", named("C0")(box)], "no such folder"  # fmt: skip
    for kind, (data, words) in label_files().items():
        def prediction(box, data=data):
            raw, maps = named("C0")(box), box / "maps"
            maps.mkdir()
            (maps / "C0.nii").write_bytes(data)
            return ["--predictions", maps, "--raw", raw, "--out", box / "out"]

        yield EVALUATE, f"label map: {kind}", prediction, words.replace("differs from", "shape").replace(
            "--same-voxels", "differs from")  # fmt: skip
    yield BENCHMARK, "a case without files", lambda box: ["--case", box, "--out", box / "out"], "no BraTS case found"
