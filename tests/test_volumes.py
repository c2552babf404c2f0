"""Reading a raw case: its files on one grid, background, and what is refused."""

import gzip
import shutil
import warnings

import nibabel
import numpy as np
import pytest
from conftest import LPS, make_head, write_raw_case
from test_nifti import turned

from models.cases import find_cases
from models.errors import InputError, InputWarning
from models.volumes import read_case

MODALITIES = ("t1", "t1ce", "t2", "flair")


def rewrite(path, voxels, affine=LPS):
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


def read_only_case(folder, **how):
    (case,) = find_cases(folder, **how)
    return read_case(case)


# ---- one grid ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", ["RAS", "SAR", "PIL"])
@pytest.mark.parametrize("role", ["seg", "flair"])
def test_a_file_in_another_axis_order_at_the_same_place_is_turned(tmp_path, codes, role):
    folder, volumes, label = write_raw_case(tmp_path, "C")
    raw = np.where(label == 3, 4, label).astype(np.uint8)
    rewrite(folder / f"C_{role}.nii.gz", *turned(raw if role == "seg" else volumes[role], LPS, codes))
    read = read_only_case(tmp_path)
    assert np.array_equal(read.image[3], volumes["flair"]) and np.array_equal(read.label, raw)
    assert np.array_equal(read.affine, LPS)


def test_a_cube_in_another_axis_order_is_turned_too(tmp_path):
    """Of a cube, no shape shows that it has to be turned."""
    folder, volumes, _ = write_raw_case(tmp_path, "C", shape=(40, 40, 40))
    rewrite(folder / "C_t2.nii.gz", *turned(volumes["t2"], LPS, "ASR"))
    read = read_only_case(tmp_path)
    assert all(np.array_equal(read.image[channel], volumes[m]) for channel, m in enumerate(MODALITIES))


@pytest.mark.parametrize("role", ["seg", "t2"])
def test_an_affine_that_the_header_lost_is_shown_beside_the_right_one_and_a_flag_says_that_the_voxels_fit(
    tmp_path, role
):
    folder, volumes, label = write_raw_case(tmp_path, "C")
    raw = np.where(label == 3, 4, label).astype(np.uint8)
    rewrite(folder / f"C_{role}.nii.gz", raw if role == "seg" else volumes[role], np.eye(4))
    with pytest.raises(InputError, match=r"affine \[1 0 0 0; .* differs .*\[-1 0 0 0; 0 -1 0 239; .*--same-voxels"):
        read_only_case(tmp_path)
    read = read_only_case(tmp_path, same_voxels=True)
    assert np.array_equal(read.label, raw) and np.array_equal(read.image[2], volumes["t2"])
    assert np.array_equal(read.affine, LPS)


def test_another_shape_is_refused_whatever_the_flag_says(tmp_path):
    folder, _, label = write_raw_case(tmp_path, "C")
    rewrite(folder / "C_seg.nii.gz", label[1:])
    with pytest.raises(InputError, match="shape"):
        read_only_case(tmp_path, same_voxels=True)


def test_trailing_dimensions_are_left_out(tmp_path):
    folder, volumes, label = write_raw_case(tmp_path, "C")
    rewrite(folder / "C_t1ce.nii.gz", volumes["t1ce"][..., None])
    rewrite(folder / "C_seg.nii.gz", label[..., None, None].astype(np.int16))
    read = read_only_case(tmp_path)
    assert np.array_equal(read.image[1], volumes["t1ce"]) and np.array_equal(read.label, label)


# ---- what is refused -----------------------------------------------------------------------------------------------


def flatten_affine(path):
    """Zero the third row of the sform in the header (bytes 312 to 327), which nibabel would not write."""
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[312:328] = bytes(16)
    path.write_bytes(gzip.compress(bytes(data)))


DAMAGE = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:3000]), "truncated"),
    "without its last bytes": (lambda p: p.write_bytes(p.read_bytes()[:-4]), "truncated"),
    "text": (lambda p: p.write_text("<html>not found</html>"), "not a readable NIfTI"),
    "gzipped text": (lambda p: p.write_bytes(gzip.compress(b"hello " * 500)), "not a readable NIfTI"),
    "empty": (lambda p: p.write_bytes(b""), "not a readable NIfTI"),
    "another shape": (lambda p: rewrite(p, np.ones((9, 9, 9), np.int16)), "shape"),
    "another place": (lambda p: rewrite(p, np.ones((44, 48, 40), np.int16), np.diag([1, 1, 1, 1.0])), "affine"),
    "colours": (lambda p: rewrite(p, np.ones((44, 48, 40, 3), np.int16)), "three dimensions"),
    "NaN": (lambda p: rewrite(p, np.full((44, 48, 40), np.nan, np.float32)), "NaN"),
    "zero": (lambda p: rewrite(p, np.zeros((44, 48, 40), np.int16)), r"every voxel is 0\."),
    "one intensity": (lambda p: rewrite(p, np.full((44, 48, 40), 0.5, np.float32)), r"every voxel is 0\.5\."),
    "a singular affine": (lambda p: flatten_affine(p), "affine is singular"),
    "missing": (lambda p: p.unlink(), r"has no t2 file.*found: flair \(C_flair\.nii\.gz\), seg .*t1 .*t1ce"),
    "double": (lambda p: shutil.copy(p, p.with_suffix("")), "two files for t2"),
}


@pytest.mark.filterwarnings("ignore::models.errors.InputWarning")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path, damage):
    folder, _, _ = write_raw_case(tmp_path, "C")
    spoil, reason = DAMAGE[damage]
    spoil(folder / "C_t2.nii.gz")
    with pytest.raises(InputError, match=reason) as caught:
        read_only_case(tmp_path)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("instead_of_1", [0.5, np.nan, np.inf])
def test_a_segmentation_of_what_are_no_labels_is_refused(tmp_path, instead_of_1):
    folder, _, label = write_raw_case(tmp_path, "C")
    rewrite(folder / "C_seg.nii.gz", np.where(label == 1, instead_of_1, label).astype(np.float32))
    with pytest.raises(InputError, match="not whole numbers"):
        read_only_case(tmp_path)


def test_a_segmentation_that_scaling_has_moved_by_a_hair_is_rounded(tmp_path):
    folder, _, label = write_raw_case(tmp_path, "C")
    raw = np.where(label == 3, 4, label)
    rewrite(folder / "C_seg.nii.gz", (raw * np.float32(1.0000153)).astype(np.float32))
    read = read_only_case(tmp_path).label
    assert read.dtype == np.int16 and np.array_equal(read, raw)


# ---- background ----------------------------------------------------------------------------------------------------


def write_head(folder, change):
    """A case on a wide empty field; `change(volume, inside)` is what happened to each volume. Returns the volumes as
    they were, and where the head is."""
    volumes, label = make_head()
    wide = {m: np.pad(volume, ((20, 12), (15, 17), (4, 12))) for m, volume in volumes.items()}
    for modality, volume in wide.items():
        (folder / "C").mkdir(exist_ok=True)
        rewrite(folder / f"C/C_{modality}.nii.gz", change(volume, volume != 0))
    rewrite(folder / "C/C_seg.nii.gz", np.pad(label, ((20, 12), (15, 17), (4, 12))))
    return wide


def z_score(volume, inside, fill=None):
    scored = ((volume - volume[inside].mean()) / volume[inside].std()).astype(np.float32)
    return scored if fill is None else np.where(inside, scored, np.float32(fill))


NOT_ZERO = {
    "z-scored with its background": z_score,
    "filled with -9": lambda volume, inside: z_score(volume, inside, -9),
    "whole numbers over an offset": lambda volume, inside: (volume + 7).astype(np.int16),
    "scaled to -1..1": lambda volume, inside: (2 * volume / volume.max() - 1).astype(np.float32),
    "below every intensity": lambda volume, inside: np.where(inside, volume, -1024).astype(np.int16),
    "zero but for rounding": lambda volume, inside: np.where(
        inside, volume, np.random.default_rng(0).normal(0, 1e-6, volume.shape)
    ).astype(np.float32),
}


@pytest.mark.parametrize("kind", NOT_ZERO)
def test_a_constant_background_becomes_0_and_is_told(tmp_path, kind):
    wide = write_head(tmp_path, NOT_ZERO[kind])
    with pytest.warns(InputWarning, match=r"C: t1 .*, t1ce .*, t2 .*, flair .*: the constant around the head is not 0"):
        read = read_only_case(tmp_path)
    for channel, modality in enumerate(MODALITIES):
        stored = NOT_ZERO[kind](wide[modality], wide[modality] != 0)
        assert np.array_equal(read.image[channel] != 0, wide[modality] != 0), modality
        assert np.allclose(read.image[channel], np.where(wide[modality] != 0, stored, 0), rtol=0, atol=1e-30), modality


def test_tissue_of_intensity_0_in_another_background_stays_tissue(tmp_path):
    def with_a_zero(volume, inside):
        changed = np.where(inside, volume, -100).astype(np.int16)
        changed[40, 40, 24] = 0
        return changed

    write_head(tmp_path, with_a_zero)
    with pytest.warns(InputWarning):
        read = read_only_case(tmp_path)
    assert read.image[:, 40, 40, 24].all() and (read.image[:, 40, 40, 24] <= 1).all()


def noise(volume, inside):
    rng = np.random.default_rng(0)
    return np.where(inside, volume, np.abs(rng.normal(0, 6, volume.shape)) + 1).astype(np.float32)


def weak_noise(volume, inside):
    """Of whole numbers, so that most voxels around the head are 0."""
    return np.where(inside, volume, np.abs(np.random.default_rng(0).normal(0, 0.4, volume.shape)).round())


@pytest.mark.parametrize("around", [noise, weak_noise])
def test_noise_around_the_head_is_told_and_left_as_it_is(tmp_path, around):
    wide = write_head(tmp_path, lambda volume, inside: around(volume, inside).astype(np.float32))
    with pytest.warns(InputWarning, match=r"C: t1, t1ce, t2, flair: .*is this skull-stripped\?") as told:
        read = read_only_case(tmp_path)
    assert len(told) == 1 and np.array_equal(read.image[0], around(wide["t1"], wide["t1"] != 0).astype(np.float32))


def test_more_than_a_brain_is_told(tmp_path):
    """Three litres are a head with its skull."""
    spacing = np.cbrt(3000 / (np.count_nonzero(make_head()[0]["t1"]) / 1e3))
    write_raw_case(tmp_path, "C", affine=np.diag([spacing] * 3 + [1.0]))
    with pytest.warns(InputWarning, match=r"C: 3\.0 litres: .*is this skull-stripped\?"):
        read_only_case(tmp_path)


def test_a_head_with_zero_around_it_is_read_without_a_word(tmp_path):
    folder, _, _ = write_raw_case(tmp_path, "C")
    for path in folder.iterdir():  # cropped to the head
        rewrite(path, np.asarray(nibabel.load(path).dataobj)[4:-4, 4:-4, 4:-4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_only_case(tmp_path)
