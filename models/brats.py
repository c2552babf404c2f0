"""Facts and files of the BraTS data sets: modalities, labels, regions, folder layouts, reading and writing NIfTI.

Three layouts are found without a flag:
* BraTS 2017-2021: `<case>/<case>_{t1,t1ce,t2,flair,seg}.nii[.gz]`, labels 0 1 2 4
* BraTS 2023 on:   `<case>/<case>-{t1n,t1c,t2w,t2f,seg}.nii.gz`, labels 0 1 2 3
* MSD Task01:      `imagesTr/<case>.nii.gz` (4-D), `labelsTr/<case>.nii.gz`, `dataset.json`
"""

import gzip
import json
import logging
import os
import re
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import nibabel
import numpy as np
from isal import igzip, isal_zlib
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import io_orientation
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling
from nibabel.wrapstruct import WrapStructError

from models.errors import InputError, one_line
from models.files import write_atomically

logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # what it prints of bad headers, InputError says

MODALITIES = ("t1", "t1ce", "t2", "flair")  # the channel order of every tensor, checkpoint and figure
LABELS = {1: "NCR", 2: "ED", 3: "ET"}  # training labels; 0 is background
LABEL_NAMES = {"NCR": "necrotic / non-enhancing core", "ED": "oedema", "ET": "enhancing tumour"}
REGIONS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
REGION_CHANNELS = ("TC", "WT", "ET")  # the order of a network's outputs where they are regions, not labels
TARGETS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,), "NCR": (1,), "ED": (2,)}  # what is scored, in table order

# Raw label -> training label. The meaning of a raw value is decided per data set: 4 is the enhancing tumour up to
# 2021 but the resection cavity in 2024, and 1 is oedema in the MSD but necrosis everywhere else.
LABEL_SCHEMES = {
    "brats2021": {0: 0, 1: 1, 2: 2, 4: 3},
    "brats2023": {0: 0, 1: 1, 2: 2, 3: 3},
    "brats2024": {0: 0, 1: 1, 2: 2, 3: 3, 4: 0},  # the resection cavity is not tumour
    "msd": {0: 0, 1: 2, 2: 1, 3: 3},
}
# A layout is known by its file names; unless the user says otherwise, its labels follow the scheme of the same name.
LAYOUTS = {
    "brats2021": "BraTS 2017-2021 names (t1, t1ce, t2, flair)",
    "brats2023": "BraTS 2023 names (t1n, t1c, t2w, t2f)",
    "msd": "MSD Task01 (4-D files)",
}

ROLES = {
    "brats2021": {"t1": "t1", "t1ce": "t1ce", "t2": "t2", "flair": "flair", "seg": "seg"},
    "brats2023": {"t1n": "t1", "t1c": "t1ce", "t2w": "t2", "t2f": "flair", "seg": "seg"},
}
FILE_NAMES = {
    "brats2021": re.compile(r"(?P<case>.+)_(?P<role>t1|t1ce|t2|flair|seg)\.nii(\.gz)?", re.IGNORECASE),
    "brats2023": re.compile(r"(?P<case>.+)-(?P<role>t1n|t1c|t2w|t2f|seg)\.nii(\.gz)?", re.IGNORECASE),
}
# In BraTS 2020 the segmentation of case 355 is called W39_1998.09.19_Segm.nii.
STRAY_SEGMENTATION = re.compile(r".+_segm\.nii(\.gz)?", re.IGNORECASE)
MSD_MODALITIES = {"T1": "t1", "T1W": "t1", "T1GD": "t1ce", "T1CE": "t1ce", "T2": "t2", "T2W": "t2", "FLAIR": "flair"}


@dataclass(frozen=True)
class Case:
    """One patient visit as found on disk. `files` may be incomplete: `read_case` is where that is refused."""

    name: str
    layout: str  # a key of LAYOUTS
    files: dict[str, tuple[Path, ...]]  # modality or "seg" -> files; MSD: "4d" in place of the modalities
    channels: tuple[str, ...] = ()  # MSD: what the 4-D file's channels are

    @property
    def patient(self) -> str:
        """Two visits of one patient share this; cases that carry no visit number are their own patient."""
        visit = re.fullmatch(r"(BraTS-.+-\d{4,5})-\d{3}|(Brats1[789]_.+)_\d+", self.name, re.IGNORECASE)
        return (visit[1] or visit[2]) if visit else self.name

    @property
    def labelled(self) -> bool:
        return "seg" in self.files

    @property
    def source_files(self) -> list[Path]:
        return sorted(path for paths in self.files.values() for path in paths)


@dataclass(frozen=True)
class Volumes:
    """A case in memory, in native space: `image` [4, X, Y, Z] (int16 as BraTS stores it, else float32), `label` raw
    values uint8 or int16 [X, Y, Z] or None, `affine` float64 [4, 4] in mm."""

    image: np.ndarray
    label: np.ndarray | None
    affine: np.ndarray


# ---- orientation -----------------------------------------------------------------------------------------------------


def native_axes(affine) -> list[int]:
    """The native axis that runs along right, along anterior and along superior."""
    return [int(axis) for axis in np.argsort(io_orientation(np.asarray(affine))[:, 0])]


def to_ras(volume: np.ndarray, affine) -> np.ndarray:
    """[C, X, Y, Z] of native space with its axes permuted and flipped to RAS, as a view [C, D, H, W]."""
    signs = io_orientation(np.asarray(affine))[:, 1]
    source = native_axes(affine)
    volume = volume.transpose(0, *(axis + 1 for axis in source))
    return volume[(slice(None), *(slice(None, None, int(signs[axis])) for axis in source))]


def spacing_of(affine) -> list[float]:
    """Voxel size in mm along the RAS axes."""
    sizes = np.linalg.norm(np.asarray(affine, float)[:3, :3], axis=0)
    return [float(sizes[axis]) for axis in native_axes(affine)]


def occupied_box(volume: np.ndarray) -> list[tuple[int, int]]:
    """[low, high) along every axis of the voxels of [...] that are not zero; (0, 0) where all are."""
    # Bits or-ed along the other axes: no mask of the whole grid is made, and negative voxels count.
    bits = volume if volume.dtype.kind in "iu" else volume != 0
    box = []
    for axis in range(volume.ndim):
        line = np.bitwise_or.reduce(bits, axis=tuple(other for other in range(volume.ndim) if other != axis))
        occupied = np.flatnonzero(line)
        box.append((int(occupied[0]), int(occupied[-1]) + 1) if occupied.size else (0, 0))
    return box


# ---- finding cases -------------------------------------------------------------------------------------------------


def find_cases(root: str | Path) -> list[Case]:
    """Every case below `root` (or `root` itself), sorted by name. Raises InputError when there is none."""
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder. Give the folder that holds the BraTS case folders.")
    cases = _find_msd(root) + _find_folders(root)
    if not cases:
        raise InputError(
            f"{root}: no BraTS case found. Expected <case>/<case>_t1.nii.gz (BraTS 2017-2021), "
            "<case>/<case>-t1n.nii.gz (2023 on) or dataset.json with imagesTr/ (MSD Task01)."
        )
    cases.sort(key=lambda case: case.name)
    for case, following in pairwise(cases):
        if case.name == following.name:
            folders = f"{case.source_files[0].parent} and {following.source_files[0].parent}"
            raise InputError(f"case {case.name} is there twice, in {folders}. Keep one of them.")
    return cases


def _find_folders(root: Path) -> list[Case]:
    found: dict[tuple[str, str, str], dict[str, list[Path]]] = {}  # (folder, layout, case) -> role -> files
    strays: dict[str, list[Path]] = {}
    seen = set()  # by their real paths: links are followed, and one may lead back
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders.sort()
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        for name in sorted(names):
            if name.startswith("."):  # macOS leaves ._ files in archives
                continue
            path = Path(folder, name)
            if STRAY_SEGMENTATION.fullmatch(name):
                strays.setdefault(folder, []).append(path)
            for layout, pattern in FILE_NAMES.items():
                if match := pattern.fullmatch(name):
                    role = ROLES[layout][match["role"].lower()]
                    files = found.setdefault((folder, layout, match["case"]), {})
                    files.setdefault(role, []).append(path)
    for (folder, _, _), files in found.items():
        if "seg" not in files and folder in strays:
            files["seg"] = strays[folder]
    return [
        Case(name, layout, {role: tuple(paths) for role, paths in files.items()})
        for (_, layout, name), files in found.items()
        if set(files) != {"seg"}  # a folder of segmentations alone, such as our own predictions, is no case
    ]


def _find_msd(root: Path) -> list[Case]:
    description = root / "dataset.json"
    if not description.is_file():
        return []
    try:
        named = json.loads(description.read_text())["modality"]
        channels = tuple(MSD_MODALITIES[named[str(i)].upper()] for i in range(len(named)))
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{description}: not the dataset.json of MSD Task01_BrainTumour ({error}).") from None
    if sorted(channels) != sorted(MODALITIES):
        raise InputError(f"{description}: modalities {channels}, expected FLAIR, T1w, T1gd and T2w.")
    cases = []
    for folder in ("imagesTr", "imagesTs"):
        for path in sorted(root.glob(f"{folder}/[!.]*.nii*")):
            name = path.name.split(".nii")[0]
            labels = sorted(root.glob(f"{folder.replace('images', 'labels')}/{name}.nii*"))
            files = {"4d": (path,)} | ({"seg": tuple(labels)} if labels else {})
            cases.append(Case(name, "msd", files, channels))
    return cases


# ---- reading and writing -------------------------------------------------------------------------------------------


def read_nifti(path: str | Path, into: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Voxels in their stored (or scaled) type and the affine [4, 4] in mm of one NIfTI file.

    The voxels are `into`, an array laid out as in a file, where that has their shape and stored type: large arrays cost
    the system as much time to hand out as the processor to fill.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            # igzip checks the CRC: a truncated or altered file cannot pass.
            stream = igzip.IGzipFile(fileobj=file) if file.peek(2)[:2] == b"\x1f\x8b" else file
            header = nibabel.Nifti1Header.from_fileobj(stream)
            stream.seek(header.get_data_offset())
            shape, dtype = header.get_data_shape(), header.get_data_dtype()
            fits = into is not None and (into.shape, into.dtype) == (shape, dtype)
            voxels = into if fits else np.empty(shape, dtype, order="F")
            if stream.readinto(voxels.ravel("K").view(np.uint8)) < voxels.nbytes:
                raise EOFError("the voxels end too early")
            while stream.read(2**20):  # to the end of the stream, where the CRC is
                pass
    except (EOFError, zlib.error, isal_zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: truncated or damaged ({one_line(error)}). Download or copy it again.") from None
    except (ImageFileError, HeaderDataError, WrapStructError, ValueError) as error:
        raise InputError(f"{path}: not a readable NIfTI file ({one_line(error)}).") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}.") from None
    affine = header.get_best_affine()
    if abs(np.linalg.det(affine[:3, :3])) < 1e-6 or not np.isfinite(affine).all():
        raise InputError(f"{path}: its affine is singular, so the voxels have no place in space. Repair the header.")
    slope, intercept = header.get_slope_inter()
    return apply_read_scaling(voxels, slope, intercept), affine


def read_label(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Raw label values, uint8 or int16 [X, Y, Z], and the affine of a segmentation. Scaled files hold values such as
    1.0000153: what is within 1e-3 of a whole number is rounded, anything else is refused."""
    voxels, affine = read_nifti(path)
    if voxels.dtype in (np.uint8, np.int16):
        return voxels, affine
    with np.errstate(invalid="ignore"):  # NaN, and numbers that int16 cannot hold, differ from what they become
        label = np.rint(voxels).astype(np.int16)
    if not (np.abs(label - voxels) <= 1e-3).all():
        raise InputError(f"{path}: holds values that are not whole numbers. Give a label map, not a probability map.")
    return label, affine


def read_case(case: Case) -> Volumes:
    """All four modalities and, where there is one, the segmentation; refused unless they fit together."""
    _refuse_missing_or_double(case)
    image, affine, reference = _read_4d(case) if case.layout == "msd" else _read_modalities(case)
    label = None
    if case.labelled:
        path = case.files["seg"][0]
        label, its_affine = read_label(path)
        _refuse_other_grid(path, label, its_affine, reference, image.shape[1:], affine)
    return Volumes(image, label, affine)


def _read_modalities(case: Case):
    reference = case.files[MODALITIES[0]][0]
    image, affine = None, None
    for channel, modality in enumerate(MODALITIES):
        path = case.files[modality][0]
        voxels, its_affine = read_nifti(path, None if image is None else image[channel])
        if voxels.ndim != 3:
            raise InputError(f"{path}: shape {voxels.shape}, expected three dimensions [X, Y, Z].")
        if image is None:
            image, affine = _empty_image(voxels.shape, np.int16), its_affine
        if not np.can_cast(voxels.dtype, image.dtype):
            image = image.astype(np.float32)
        _refuse_other_grid(path, voxels, its_affine, reference, image.shape[1:], affine)
        _refuse_bad_voxels(voxels, path)
        if not np.shares_memory(image, voxels):
            image[channel] = voxels
    return image, affine, reference


def _read_4d(case: Case):
    path = case.files["4d"][0]
    voxels, affine = read_nifti(path)
    if voxels.ndim != 4 or voxels.shape[3] != len(MODALITIES):
        raise InputError(f"{path}: shape {voxels.shape}, expected [X, Y, Z, {len(MODALITIES)}].")
    dtype = np.int16 if np.can_cast(voxels.dtype, np.int16) else np.float32
    image = _empty_image(voxels.shape[:3], dtype)
    for channel, modality in enumerate(MODALITIES):
        image[channel] = voxels[..., case.channels.index(modality)]
        _refuse_bad_voxels(image[channel], f"{path} ({modality})")
    return image, affine, path


def _empty_image(shape, dtype) -> np.ndarray:
    """[4, X, Y, Z] with each modality laid out as in a NIfTI file, X the fastest: to fill it is a plain copy."""
    return np.empty((len(MODALITIES), *shape[::-1]), dtype).transpose(0, 3, 2, 1)


def _refuse_missing_or_double(case: Case):
    wanted = ("4d",) if case.layout == "msd" else MODALITIES
    missing = [role for role in wanted if role not in case.files]
    if missing:
        folder = case.source_files[0].parent
        raise InputError(f"{folder}: case {case.name} has no {', '.join(missing)} file. All four are needed.")
    for role, paths in case.files.items():
        if len(paths) > 1:
            names = " and ".join(path.name for path in paths)
            raise InputError(f"{paths[0].parent}: two files for {role}: {names}. Remove one of them.")


def _refuse_other_grid(path, voxels, affine, reference, shape, reference_affine):
    if voxels.shape != shape:
        raise InputError(f"{path}: shape {voxels.shape} differs from {reference.name} {shape}. Register them first.")
    if not np.allclose(affine, reference_affine, atol=1e-2):
        raise InputError(f"{path}: its affine differs from that of {reference.name}. Register the files first.")


def _refuse_bad_voxels(voxels: np.ndarray, path):
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise InputError(f"{path}: holds NaN or infinite voxels. Repair or leave out this case.")
    if not voxels.any():
        raise InputError(f"{path}: every voxel is zero. Repair or leave out this case.")


def to_training_labels(label: np.ndarray, scheme: str, path="the segmentation") -> np.ndarray:
    """Raw label values [...] of one scheme -> training labels uint8 [...]; an unknown value is refused."""
    mapping = LABEL_SCHEMES[scheme]
    tumour = tuple(slice(low, high) for low, high in occupied_box(label))  # a fortieth of a head, all else is 0
    inside = label[tumour]
    values = np.unique(inside) if inside.size and inside.min() < 0 else np.flatnonzero(np.bincount(inside.ravel()))
    unknown = [int(value) for value in values if value not in mapping]
    if unknown:
        fitting = [name for name, other in LABEL_SCHEMES.items() if set(values.tolist()) <= set(other)]
        advice = f" If this data set uses another scheme, say --labels {' or '.join(fitting)}." if fitting else ""
        raise InputError(f"{path}: label value {unknown[0]} is not one of {sorted(mapping)} ({scheme}).{advice}")
    table = np.zeros(max(mapping) + 1, np.uint8)
    for raw, training in mapping.items():
        table[raw] = training
    result = np.zeros_like(label, np.uint8)
    result[tumour] = table[inside]
    return result


def to_raw_labels(label: np.ndarray, scheme: str) -> np.ndarray:
    """Training labels [...] -> the raw values of the data set, uint8 [...]."""
    table = np.zeros(len(LABELS) + 1, np.uint8)
    for raw, training in LABEL_SCHEMES[scheme].items():
        if training:
            table[training] = raw
    return table[label]


def write_label_nifti(path: str | Path, label: np.ndarray, affine: np.ndarray):
    """A label map [X, Y, Z] as a uint8 `.nii.gz` on the grid of `affine`; whole or not there at all."""
    image = nibabel.Nifti1Image(label.astype(np.uint8), affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    write_atomically(path, igzip.compress(image.to_bytes(), compresslevel=2))
