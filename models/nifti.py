"""NIfTI files: voxels and affines, read and written, and one grid turned into the axis order of another."""

import gzip
import io
import logging
import math
import warnings
import zlib
from contextlib import contextmanager
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
from models.memory import free_ram_bytes

logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # what it prints of bad headers, InputError says

GZIP = b"\x1f\x8b"  # how a gzip member begins
HEADER_BYTES, HEADER_2_BYTES = 348, 540  # of NIfTI-1 and NIfTI-2, which begin with this number
LARGEST_COMPRESSION = 1032  # of the gzip format: a file that promises more is not whole
SAME_AFFINE = 1e-2  # mm that the elements of two affines may differ by: headers are rounded
SMALLEST_VOXEL_MM = 0.2  # its longest side: no scanner makes heads of smaller ones, but centimetres taken for mm do
THINNEST_VOXEL_MM = 0.01  # its shortest side: the resampled volume would have no voxels along it
LARGEST_EXTENT_MM = 700  # of a volume along an axis: a scanner sees 500, and at 1 mm more takes minutes and gigabytes

# ---- grids ---------------------------------------------------------------------------------------------------------


def native_axes(affine) -> list[int]:
    """The native axis that runs along right, along anterior and along superior."""
    return [int(axis) for axis in np.argsort(io_orientation(np.asarray(affine))[:, 0])]


def to_ras(volume: np.ndarray, affine) -> np.ndarray:
    """[C, X, Y, Z] of native space with its axes permuted and flipped to RAS, as a view [C, D, H, W]."""
    signs = io_orientation(np.asarray(affine))[:, 1]
    source = native_axes(affine)
    volume = volume.transpose(0, *(axis + 1 for axis in source))
    # A single voxel is not flipped: numpy calls what torch refuses, a negative step along it, contiguous.
    steps = [int(signs[axis]) if count > 1 else 1 for axis, count in zip(source, volume.shape[1:], strict=True)]
    return volume[(slice(None), *(slice(None, None, step) for step in steps))]


def spacing_of(affine) -> list[float]:
    """Voxel size in mm along the RAS axes."""
    sizes = np.linalg.norm(np.asarray(affine, float)[:3, :3], axis=0)
    return [float(sizes[axis]) for axis in native_axes(affine)]


def onto_grid(voxels: np.ndarray, affine, shape, reference_affine) -> np.ndarray | None:
    """[X, Y, Z] in the axis order of another grid of the same places in space; None where the places are others."""
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
    the system as much time to hand out as the processor to fill. InputError for a file that is damaged or holds
    something else, before memory is taken for what its header promises.
    """
    path = Path(path)
    with _told_as_input_error(path):
        with path.open("rb") as file:
            if file.peek(2)[:2] != GZIP:
                header, voxels = _read_stream(file, path, into)
            else:
                try:
                    header, voxels = _read_stream(igzip.IGzipFile(fileobj=file), path, into)
                except (EOFError, gzip.BadGzipFile):
                    header, voxels = _read_stream(igzip.IGzipFile(fileobj=_whole_members(path)), path, into)
        with np.errstate(all="ignore"):  # infinite voxels are refused by those who use them
            affine = _checked_affine(path, header)
            return apply_read_scaling(voxels, *header.get_slope_inter()), affine


def read_grid(path: str | Path) -> tuple[tuple[int, ...], np.dtype, np.ndarray]:
    """Shape, type and affine [4, 4] in mm of what `read_nifti` would read, from the header alone."""
    path = Path(path)
    with _told_as_input_error(path), np.errstate(all="ignore"), path.open("rb") as file:
        header = _read_header(igzip.IGzipFile(fileobj=file) if file.peek(2)[:2] == GZIP else file, path)
        scaled = header.get_slope_inter() not in ((None, None), (1, 0))
        dtype = np.dtype(float) if scaled else header.get_data_dtype()
        return header.get_data_shape(), dtype, header.get_best_affine()


@contextmanager
def _told_as_input_error(path: Path):
    """Whatever a file that is not as it should be makes the libraries raise, as one line that names it."""
    if path.exists() and not path.is_file():  # to open a pipe would wait for ever
        raise InputError(f"{path}: not a file. Name a .nii or .nii.gz file.")
    try:
        yield
    except InputError:
        raise
    except (EOFError, zlib.error, isal_zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: truncated or damaged ({one_line(error)}). Download or copy it again.") from None
    except (ImageFileError, HeaderDataError, WrapStructError, ValueError, ArithmeticError) as error:
        raise InputError(f"{path}: not a readable NIfTI file ({one_line(error)}). Download or copy it again.") from None
    except MemoryError:
        raise InputError(f"{path}: there is too little memory for its voxels. Close other programs.") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}.") from None


def _read_header(stream, path: Path) -> nibabel.Nifti1Header:
    """The header, without the extensions that may follow it; refused where it promises what cannot be."""
    block, kind = stream.read(HEADER_BYTES), nibabel.Nifti1Header
    if HEADER_2_BYTES in (int.from_bytes(block[:4], order) for order in ("little", "big")):
        block, kind = block + stream.read(HEADER_2_BYTES - HEADER_BYTES), nibabel.Nifti2Header
    if len(block) < kind.sizeof_hdr:
        raise ValueError(f"it ends within its header, after {len(block)} bytes")
    header = kind(block)
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    if header["magic"].item() != header.single_magic:
        raise ValueError("its voxels are in another file, .img: convert the pair to a .nii file")
    if dtype.kind not in "iuf":
        raise ValueError("its voxels are colours or complex numbers")
    if not shape or min(shape) < 1:
        raise ValueError(f"its header says the shape {shape}")
    promised, stored = math.prod(map(int, shape)) * dtype.itemsize, path.stat().st_size
    if promised > stored * (LARGEST_COMPRESSION if isinstance(stream, igzip.IGzipFile) else 1):
        raise EOFError(f"its header promises {promised / 2**30:.3g} GiB of voxels, and the file has {stored} bytes")
    if promised > (free := free_ram_bytes()):
        raise InputError(f"{path}: its voxels take {promised / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free.")
    return header


def _read_stream(stream, path: Path, into: np.ndarray | None) -> tuple[nibabel.Nifti1Header, np.ndarray]:
    header = _read_header(stream, path)
    stream.seek(max(header.get_data_offset(), header.single_vox_offset))
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    fits = into is not None and (into.shape, into.dtype) == (shape, dtype)
    voxels = into if fits else np.empty(shape, dtype, order="F")
    if stream.readinto(voxels.ravel("K").view(np.uint8)) < voxels.nbytes:
        raise EOFError("the voxels end too early")
    while isinstance(stream, igzip.IGzipFile) and stream.read(2**20):
        pass  # to the end, where igzip checks the CRC: a truncated or altered file cannot pass
    return header, voxels


def _whole_members(path: Path) -> io.BytesIO:
    """A compressed file without what follows its last gzip member, such as a web server's closing line. Raises
    EOFError or zlib.error where a member is damaged."""
    data = path.read_bytes()
    start = end = 0
    while data[start : start + 2] == GZIP:
        member, place = zlib.decompressobj(wbits=31), start
        while not member.eof:
            if place >= len(data):
                raise EOFError("the compressed data end too early")
            member.decompress(data[place : place + 2**16])  # a little at a time: it can be a thousand times as much
            place += 2**16
        start = end = min(place, len(data)) - len(member.unused_data)
        while data[start : start + 1] == b"\0":
            start += 1
    return io.BytesIO(data[:end])


def _checked_affine(path: Path, header) -> np.ndarray:
    """Voxel to mm [4, 4]; refused where it cannot be that of a head. A header says it twice, or not at all."""
    affine = header.get_best_affine()
    sizes = np.linalg.norm(affine[:3, :3], axis=0)  # mm
    if not (abs(np.linalg.det(affine[:3, :3])) > 1e-6 * np.prod(sizes) and np.isfinite(affine).all()):
        raise InputError(f"{path}: its affine is singular, so the voxels have no place in space. Repair the header.")
    extent = max(size * count for size, count in zip(sizes, header.get_data_shape(), strict=False))
    if sizes.max() < SMALLEST_VOXEL_MM or sizes.min() < THINNEST_VOXEL_MM or extent > LARGEST_EXTENT_MM:
        raise InputError(f"{path}: says that its voxels are {' x '.join(f'{size:.4g}' for size in sizes)} mm large, "
                         f"{extent:.4g} mm in all, which is no head. Repair the header, or its units.")  # fmt: skip
    sform = header.get_sform(coded=True)[0]
    try:
        qform = header.get_qform(coded=True)[0]
    except (HeaderDataError, ValueError):  # no rotation; where there is a sform, nobody needs it
        qform = np.full((4, 4), np.nan)
    if sform is None and qform is None:
        text = "sform and qform codes are 0, so nothing says which side is left"
        warnings.warn(InputWarning(path.name, text), stacklevel=4)
    elif sform is not None and qform is not None and not np.allclose(sform, qform, atol=SAME_AFFINE):
        text = f"sform {describe_affine(sform)} and qform {describe_affine(qform)} disagree; the sform is used"
        warnings.warn(InputWarning(path.name, text), stacklevel=4)
    return affine


def read_label(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Raw label values, uint8 or int16 [X, Y, Z], and the affine of a segmentation. Scaled files hold values such as
    1.0000153: what is within 1e-3 of a whole number is rounded, anything else is refused."""
    voxels, affine = read_nifti(path)
    if voxels.ndim != 3:
        raise InputError(f"{path}: shape {voxels.shape}, expected three dimensions [X, Y, Z], a label in each voxel.")
    if voxels.dtype in (np.uint8, np.int16):
        return voxels, affine
    with np.errstate(invalid="ignore"):  # NaN, and numbers that int16 cannot hold, differ from what they become
        label = np.rint(voxels).astype(np.int16)
        whole = (np.abs(label - voxels) <= 1e-3).all()
    if not whole:
        raise InputError(f"{path}: holds values that are not whole numbers. Give a label map, not a probability map.")
    return label, affine


def write_label_nifti(path: str | Path, label: np.ndarray, affine: np.ndarray):
    """A label map [X, Y, Z] as a uint8 `.nii.gz` on the grid of `affine`; whole or not there at all."""
    image = nibabel.Nifti1Image(label.astype(np.uint8), affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    write_atomically(path, igzip.compress(image.to_bytes(), compresslevel=2))
