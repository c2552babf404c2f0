"""A raw case in memory: its four modalities and its segmentation on one grid, with 0 around the head."""

import itertools
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.brats import MODALITIES
from models.cases import Case
from models.errors import InputError, InputWarning
from models.nifti import describe_affine, onto_grid, read_label, read_nifti

LARGEST_BRAIN_ML = 2300  # of what is not background; a head with its skull and scalp has a litre more
LARGEST_SHARE_IN_CORNERS = 0.01  # of voxels that are not background: no brain reaches into a corner, noise does
LARGEST_INTENSITY = 1e30  # beyond it, sums overflow
SAME_BACKGROUND = 1e-5  # of the range of intensities: how far a constant background may be spread by rounding


@dataclass(frozen=True)
class Volumes:
    """A case in memory, in native space: `image` [4, X, Y, Z] (int16 as BraTS stores it, else float32), `label` raw
    values uint8 or int16 [X, Y, Z] or None, `affine` float64 [4, 4] in mm."""

    image: np.ndarray
    label: np.ndarray | None
    affine: np.ndarray


def read_case(case: Case) -> Volumes:
    """All four modalities and, where there is one, the segmentation, in the axis order of the first file and with 0 as
    background; refused unless they fit together. What is doubtful is told by InputWarning."""
    _refuse_missing_or_double(case)
    image, affine, reference = _read_4d(case) if case.layout == "msd" else _read_modalities(case)
    _settle_background(case.name, image, affine)
    label = None
    if case.labelled:
        label = read_segmentation(case, reference, image.shape[1:], affine)
    return Volumes(image, label, affine)


def read_segmentation(case: Case, reference: Path, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Raw label values [X, Y, Z] on the grid of a reference file; refused where they lie elsewhere."""
    path = case.files["seg"][0]
    label, its_affine = read_label(path)
    return _fit(case, path, label, its_affine, reference, shape, affine)


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
        voxels = _fit(case, path, voxels, its_affine, reference, image.shape[1:], affine)
        _refuse_bad_voxels(voxels, path)
        if not np.may_share_memory(image, voxels) or voxels.strides != image[channel].strides:
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


# ---- what is refused -----------------------------------------------------------------------------------------------


def _refuse_missing_or_double(case: Case):
    wanted = ("4d",) if case.layout == "msd" else MODALITIES
    missing = [role for role in wanted if role not in case.files]
    if missing:
        found = ", ".join(f"{role} ({paths[0].name})" for role, paths in case.files.items())
        raise InputError(f"{case.source_files[0].parent}: case {case.name} has no {', '.join(missing)} file. All four "
                         f"are needed; found: {found}.")  # fmt: skip
    for role, paths in case.files.items():
        if len(paths) > 1:
            names = " and ".join(path.name for path in paths)
            raise InputError(f"{paths[0].parent}: two files for {role}: {names}. Remove one of them.")


def _fit(case: Case, path: Path, voxels, affine, reference: Path, shape, reference_affine) -> np.ndarray:
    """The voxels [X, Y, Z] in the axis order of the reference file; refused where they lie elsewhere."""
    if case.same_voxels and voxels.shape == shape:
        return voxels
    fitting = onto_grid(voxels, affine, shape, reference_affine)
    if fitting is not None:
        return fitting
    if voxels.shape != shape:
        raise InputError(f"{path}: shape {voxels.shape} differs from {reference.name} {shape}. Register them first.")
    raise InputError(f"{path}: its affine {describe_affine(affine)} differs from that of {reference.name} "
                     f"{describe_affine(reference_affine)}. Register the files first; or, if the voxels fit and only "
                     "the header is wrong, say --same-voxels.")  # fmt: skip


def _refuse_bad_voxels(voxels: np.ndarray, path):
    if voxels.dtype.kind == "f" and not (voxels.min() > -LARGEST_INTENSITY and voxels.max() < LARGEST_INTENSITY):
        raise InputError(f"{path}: holds NaN, infinite or absurdly large voxels. Repair or leave out this case.")
    if (voxels == (first := voxels.flat[0])).all():
        raise InputError(f"{path}: every voxel is {first:g}. Repair or leave out this case.")


# ---- background ----------------------------------------------------------------------------------------------------


def _settle_background(name: str, image: np.ndarray, affine: np.ndarray):
    """Make the constant around the head of each modality [4, X, Y, Z] 0, in place, and tell where there is none."""
    replaced, missing = [], []
    for modality, voxels in zip(MODALITIES, image, strict=True):
        faces = [np.moveaxis(voxels, axis, 0)[end] for axis in range(3) for end in (0, -1)]  # views: they cost nothing
        if 2 * sum(map(np.count_nonzero, faces)) > sum(face.size for face in faces):
            border = np.concatenate([face.ravel() for face in faces])
            constant = np.median(border)  # where one value has the majority, that one
            spread = SAME_BACKGROUND * (float(voxels.max()) - float(voxels.min()))
            if np.mean(np.abs(border - constant) <= spread) > 0.5:
                background = np.abs(voxels - constant) <= spread
                # Tissue of intensity 0 stays tissue.
                voxels[(voxels == 0) & ~background] = 1 if voxels.dtype.kind in "iu" else np.finfo(voxels.dtype).tiny
                voxels[background] = 0
                replaced.append(f"{modality} {constant:g}")
        if _share_in_corners(voxels) > LARGEST_SHARE_IN_CORNERS:
            missing.append(modality)
    head_ml = np.count_nonzero(image[0]) * abs(np.linalg.det(affine[:3, :3])) / 1e3
    if replaced:
        text = "the constant around the head is not 0, and is taken as background"
        warnings.warn(InputWarning(f"{name}: {', '.join(replaced)}", text), stacklevel=3)
    if missing:
        text = "the corners of the volume are not one constant, as background is: is this skull-stripped?"
        warnings.warn(InputWarning(f"{name}: {', '.join(missing)}", text), stacklevel=3)
    elif head_ml > LARGEST_BRAIN_ML:
        text = "more than a brain has is not background: is this skull-stripped?"
        warnings.warn(InputWarning(f"{name}: {head_ml / 1e3:.1f} litres", text), stacklevel=3)


def _share_in_corners(voxels: np.ndarray) -> float:
    """Of the voxels in the eight corners of [X, Y, Z], those that are not 0. A corner has a tenth of each side."""
    sides = [(n, max(1, n // 10)) for n in voxels.shape]
    ends = [(slice(0, side), slice(n - side, n)) for n, side in sides]
    return float(np.mean([np.mean(voxels[corner] != 0) for corner in itertools.product(*ends)]))
