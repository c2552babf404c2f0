"""NIfTI files: voxels and affines, read and written, and one grid turned into the axis order of another."""

import gzip
import io
import logging
import warnings
import zlib
from pathlib import Path

import nibabel
import numpy as np
from isal import igzip, isal_zlib
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling
from nibabel.wrapstruct import WrapStructError

from models.errors import InputError, InputWarning, one_line
from models.files import write_atomically

logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # what it prints of bad headers, InputError says

GZIP = b"\x1f\x8b"  # how a gzip member begins
SAME_AFFINE = 1e-2  # mm that the elements of two affines may differ by: headers are rounded

# ---- grids ---------------------------------------------------------------------------------------------------------


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


def onto_grid(voxels: np.ndarray, affine, shape, reference_affine) -> np.ndarray | None:
    """[X, Y, Z] in the axis order of another grid of the same places in space; None where the places are others."""
    if voxels.ndim != 3:
        return None
    if voxels.shape == shape and np.allclose(affine, reference_affine, atol=SAME_AFFINE):
        return voxels
    turn = io_orientation(np.linalg.solve(reference_affine, affine))
    if np.isnan(turn).any():
        return None
    turned = apply_orientation(voxels, turn)
    fits = np.allclose(affine @ inv_ornt_aff(turn, voxels.shape), reference_affine, atol=SAME_AFFINE)
    return turned if fits and turned.shape == shape else None


def describe_affine(affine) -> str:
    """The three rows of an affine in one line."""
    rows = np.asarray(affine)[:3].round(6) + 0.0  # no -0
    return "[" + "; ".join(" ".join(f"{value:.4g}" for value in row) for row in rows) + "]"


# ---- files ---------------------------------------------------------------------------------------------------------


def read_nifti(path: str | Path, into: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Voxels in their stored (or scaled) type and the affine [4, 4] in mm of one NIfTI file. Dimensions of one voxel
    after the third are left out.

    The voxels are `into`, an array laid out as in a file, where that has their shape and stored type: large arrays cost
    the system as much time to hand out as the processor to fill.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if file.peek(2)[:2] != GZIP:
                header, voxels = _read_stream(file, into)
            else:
                try:
                    header, voxels = _read_stream(igzip.IGzipFile(fileobj=file), into)
                except (EOFError, gzip.BadGzipFile):
                    header, voxels = _read_stream(igzip.IGzipFile(fileobj=_whole_members(path)), into)
    except (EOFError, zlib.error, isal_zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: truncated or damaged ({one_line(error)}). Download or copy it again.") from None
    except (ImageFileError, HeaderDataError, WrapStructError, ValueError) as error:
        raise InputError(f"{path}: not a readable NIfTI file ({one_line(error)}).") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}.") from None
    affine = header.get_best_affine()
    if abs(np.linalg.det(affine[:3, :3])) < 1e-6 or not np.isfinite(affine).all():
        raise InputError(f"{path}: its affine is singular, so the voxels have no place in space. Repair the header.")
    _warn_of_doubtful_place(path, header)
    slope, intercept = header.get_slope_inter()
    return apply_read_scaling(voxels, slope, intercept), affine


def _read_stream(stream, into: np.ndarray | None) -> tuple[nibabel.Nifti1Header, np.ndarray]:
    header = nibabel.Nifti1Header.from_fileobj(stream)
    stream.seek(header.get_data_offset())
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    fits = into is not None and (into.shape, into.dtype) == (shape, dtype)
    voxels = into if fits else np.empty(shape, dtype, order="F")
    if stream.readinto(voxels.ravel("K").view(np.uint8)) < voxels.nbytes:
        raise EOFError("the voxels end too early")
    while stream.read(2**20):  # to the end, where igzip checks the CRC: a truncated or altered file cannot pass
        pass
    return header, voxels


def _whole_members(path: Path) -> io.BytesIO:
    """A compressed file without what follows its last gzip member, such as a web server's closing line. Raises
    EOFError or zlib.error where a member is damaged."""
    data = path.read_bytes()
    rest, end = data, 0
    while rest[:2] == GZIP:
        member, tail = zlib.decompressobj(wbits=31), rest
        while not member.eof:
            if not member.decompress(tail, 2**24) and not member.eof:
                raise EOFError("the compressed data end too early")
            tail = member.unconsumed_tail
        rest = member.unused_data
        end = len(data) - len(rest)
        rest = rest.lstrip(b"\0")
    return io.BytesIO(data[:end])


def _warn_of_doubtful_place(path: Path, header):
    """A NIfTI header places its voxels twice, or not at all."""
    sform, qform = header.get_sform(coded=True)[0], header.get_qform(coded=True)[0]
    if sform is None and qform is None:
        text = "sform and qform codes are 0, so nothing says which side is left"
        warnings.warn(InputWarning(path.name, text), stacklevel=4)
    elif sform is not None and qform is not None and not np.allclose(sform, qform, atol=SAME_AFFINE):
        text = f"sform {describe_affine(sform)} and qform {describe_affine(qform)} disagree; the sform is used"
        warnings.warn(InputWarning(path.name, text), stacklevel=4)


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


def write_label_nifti(path: str | Path, label: np.ndarray, affine: np.ndarray):
    """A label map [X, Y, Z] as a uint8 `.nii.gz` on the grid of `affine`; whole or not there at all."""
    image = nibabel.Nifti1Image(label.astype(np.uint8), affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    write_atomically(path, igzip.compress(image.to_bytes(), compresslevel=2))
