"""Preprocessed cases as `.pt` files: written whole, and read without running what is in them.

A `.pt` file is a dict that `torch.load(path, weights_only=True)` reads; README.md lists its keys.
"""

import mmap
import pickle
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from isal import isal_zlib
from torch import Tensor

from models.brats import LABEL_SCHEMES, LABELS, MODALITIES
from models.errors import InputError, one_line
from models.files import whole_file
from models.records import NUMBER, is_array, is_name, is_size, misfit

warnings.filterwarnings("ignore", "Detected pickle protocol")  # of a file that is refused or read all the same


def _is_stored(value) -> bool:
    """Whether this is a tensor whose elements all are in the file: a view can claim any number of them."""
    return type(value) is Tensor and value.layout == torch.strided and value.is_cpu and value.is_contiguous()


CASE = {
    "image": _is_stored,
    "label?": _is_stored,
    "case": is_name,
    "modalities": [str],
    "label_scheme": tuple(LABEL_SCHEMES).__contains__,
    "geometry": {
        "native_shape": is_size,
        "affine": lambda rows: is_array(rows, 4, 4) and abs(np.linalg.det(rows)) > 1e-6,
        "axis_codes": str,
        "spacing_mm": lambda sides: is_array(sides, 3) and min(sides) > 0,
        "target_spacing_mm": lambda side: is_array(side) and side > 0,
        "resampled_shape": is_size,
        "crop_box": lambda box: is_array(box, 3, 2) and all(0 <= low < high for low, high in box),
        "network_size": is_size,
    },
    "normalization": {str: [NUMBER]},
}


def save_case(path: Path, case: dict, compact: bool) -> str:
    """Write a preprocessed case; `compact` stores float16 and uint8. Returns the CRC-32 of the file.

    A CRC finds damage in a tenth of the time of a SHA-256, which takes an eighth of all preprocessing.
    """
    stored = dict(case)
    if compact:
        stored["image"] = case["image"].half()
        if "label" in case:
            stored["label"] = case["label"].to(torch.uint8)
    checksum = 0
    with whole_file(path, durable=False) as file:  # it can be made again
        torch.save(stored, file)
        file.seek(0)
        while part := file.read(2**20):
            checksum = isal_zlib.crc32(part, checksum)
    return f"{checksum:08x}"


def load_tensors(path: Path, mapped: bool = True, checked: bool = True):
    """What a `.pt` file of tensors and plain values holds: no code in it is run. Raises InputError for other files.

    Args:
        mapped: what is not touched is not read, and several processes share the pages; the file must not be written to
            while they are in use.
        checked: read all of it and compare the checksums, which torch does not do.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise ValueError("its parts are compressed")  # torch would take the memory for what they claim to hold
        if checked:
            _compare_checksums(path, parts)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}.") from None
    except pickle.UnpicklingError:
        raise InputError(f"{path}: damaged, or it holds more than tensors and plain values, which is not loaded "
                         "because it could run code.") from None  # fmt: skip
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError and more for a bad file
        reason = one_line(error, 80)
        raise InputError(f"{path}: damaged, or not a file of this project ({reason}). Make it again.") from None


def _compare_checksums(path: Path, parts: list[zipfile.ZipInfo]):
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for part in parts:
            start = part.header_offset
            name, extra = struct.unpack("<HH", content[start + 26 : start + 30])  # bytes
            start += 30 + name + extra
            with memoryview(content)[start : start + part.file_size] as data:
                if isal_zlib.crc32(data) != part.CRC:
                    raise ValueError("its checksum is wrong")


def load_case(path: str | Path, as_stored: bool = False, checked: bool | None = None) -> dict:
    """A preprocessed case with `image` float32 [4, D, H, W] and, where there is one, `label` int64 [1, D, H, W];
    `as_stored` leaves the types of the file. `checked`, unless `as_stored`: see `load_tensors`; labels and voxels are
    looked at, too. Raises InputError for anything that is not such a file."""
    checked = not as_stored if checked is None else checked
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file. Make it with preprocess_brats.py.")
    case = load_tensors(path, checked=checked)
    if wrong := misfit(case, CASE):
        raise InputError(f"{path}: not a preprocessed case ({wrong}). Make it with preprocess_brats.py.")
    if tuple(case["modalities"]) != MODALITIES:
        raise InputError(f"{path}: channels {tuple(case['modalities'])}, expected {MODALITIES}. Preprocess again.")
    image, label = case["image"], case.get("label")
    if image.ndim != 4 or len(image) != len(MODALITIES) or not image.is_floating_point():
        raise InputError(f"{path}: image {tuple(image.shape)} of {image.dtype} is not [4, D, H, W]. Preprocess again.")
    if label is not None and (label.shape != (1, *image.shape[1:]) or label.dtype not in (torch.uint8, torch.int64)):
        raise InputError(f"{path}: label {tuple(label.shape)} of {label.dtype} is not [1, D, H, W]. Preprocess again.")
    if case["geometry"]["network_size"] != list(image.shape[1:]):
        raise InputError(f"{path}: its geometry is that of another image. Preprocess again.")
    if checked and not torch.isfinite(image.sum(dtype=torch.float32)):
        raise InputError(f"{path}: holds NaN or infinite voxels. Preprocess again.")
    if checked and label is not None and not 0 <= label.min() <= label.max() <= len(LABELS):
        raise InputError(f"{path}: label values from {label.min()} to {label.max()}, not 0 to {len(LABELS)}. "
                         "Preprocess again.")  # fmt: skip
    if not as_stored:
        case["image"] = image.float()
        if label is not None:
            case["label"] = label.long()
    return case
