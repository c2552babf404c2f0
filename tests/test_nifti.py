"""Reading and writing NIfTI files, and turning one grid onto another."""

import gzip
import os
import struct

import nibabel
import numpy as np
import pytest
import torch
from conftest import LPS, make_head
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from models.errors import InputError, InputWarning
from models.files import write_atomically
from models.nifti import onto_grid, read_grid, read_label, read_nifti, to_ras, write_label_nifti


def turned(voxels, affine, codes: str):
    """The same places in space, stored in the axis order of `codes`, by nibabel."""
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(codes))
    return apply_orientation(voxels, turn), affine @ inv_ornt_aff(turn, voxels.shape)


# ---- reading -------------------------------------------------------------------------------------------------------


def test_scaled_nifti_files_are_read_as_nibabel_reads_them(tmp_path):
    image = nibabel.Nifti1Image(make_head()[0]["t1"].astype(np.float32) * 0.37, LPS)
    image.set_data_dtype(np.int16)  # nibabel then stores a slope
    nibabel.save(image, tmp_path / "a.nii.gz")
    assert np.array_equal(read_nifti(tmp_path / "a.nii.gz")[0], nibabel.load(tmp_path / "a.nii.gz").get_fdata())


@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_nifti_2_is_read_as_nibabel_reads_it(tmp_path, byte_order):
    voxels = make_head()[0]["t1"]
    header = nibabel.Nifti2Header(endianness=byte_order)
    nibabel.save(nibabel.Nifti2Image(voxels, LPS, header), tmp_path / "a.nii.gz")
    found, affine = read_nifti(tmp_path / "a.nii.gz")
    assert np.array_equal(found, voxels) and np.array_equal(affine, LPS)
    assert read_grid(tmp_path / "a.nii.gz")[0] == voxels.shape


@pytest.mark.parametrize("factor", [1e-3, 0.1, 20, 1e3])
def test_a_head_of_another_size_than_any_head_is_refused_with_that_size(tmp_path, factor):
    """Metres or centimetres where millimetres belong, or a number too many: the resampled head would be a speck, or
    would take all memory."""
    affine = np.diag([factor, factor, factor, 1])
    nibabel.save(nibabel.Nifti1Image(make_head()[0]["t1"], affine), tmp_path / "a.nii")
    with pytest.raises(InputError, match=rf"voxels are {factor:g} x {factor:g} x {factor:g} mm large.*no head"):
        read_nifti(tmp_path / "a.nii")


def test_an_axis_along_which_voxels_have_no_extent_is_refused(tmp_path):
    nibabel.save(nibabel.Nifti1Image(make_head()[0]["t1"], np.diag([1, 1, 1e-30, 1])), tmp_path / "a.nii")
    with pytest.raises(InputError, match=r"1 x 1 x 1e-30 mm large.*no head"):
        read_nifti(tmp_path / "a.nii")


def test_what_is_shorter_than_a_header_is_told_as_that(tmp_path):
    (tmp_path / "a.nii.gz").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(InputError, match=r"ends within its header, after 42 bytes\).*copy it again"):
        read_nifti(tmp_path / "a.nii.gz")


def test_a_label_map_with_a_channel_for_each_label_is_refused(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((9, 8, 7, 3), np.uint8), LPS), tmp_path / "a.nii")
    with pytest.raises(InputError, match=r"\(9, 8, 7, 3\), expected three dimensions .* a label in each voxel"):
        read_label(tmp_path / "a.nii")


@pytest.mark.parametrize("more", [(1,), (1, 1), (1, 1, 1)])
def test_dimensions_of_one_voxel_after_the_third_are_left_out(tmp_path, more):
    voxels = make_head()[0]["t1"]
    nibabel.save(nibabel.Nifti1Image(voxels.reshape(*voxels.shape, *more), LPS), tmp_path / "a.nii.gz")
    assert np.array_equal(read_nifti(tmp_path / "a.nii.gz")[0], voxels)


COMPRESSION = {
    "not compressed": lambda raw: raw,
    "several gzip members": lambda raw: gzip.compress(raw[:9999]) + gzip.compress(raw[9999:]),
    "zeros after the stream": lambda raw: gzip.compress(raw) + bytes(512),
    "text after the stream": lambda raw: gzip.compress(raw) + b"\n<!-- end -->",
    "one byte after the stream": lambda raw: gzip.compress(raw) + b"\n",
    "text after several members": lambda raw: gzip.compress(raw[:9999]) + gzip.compress(raw[9999:]) + b"\0\0end",
    "bytes after the voxels": lambda raw: gzip.compress(raw + bytes(1000)),
}


@pytest.mark.parametrize("kind", COMPRESSION)
def test_what_surrounds_the_voxels_in_a_nii_gz_does_not_matter(tmp_path, kind):
    voxels = make_head()[0]["t1"]
    (tmp_path / "a.nii.gz").write_bytes(COMPRESSION[kind](nibabel.Nifti1Image(voxels, LPS).to_bytes()))
    assert np.array_equal(read_nifti(tmp_path / "a.nii.gz")[0], voxels)


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_header_that_promises_more_than_the_file_can_hold_is_refused_before_memory_is_taken(tmp_path, compress):
    raw = bytearray(nibabel.Nifti1Image(make_head()[0]["t1"], LPS).to_bytes())
    struct.pack_into("<3h", raw, 42, 32000, 32000, 32000)  # dim[1] to dim[3]: 60 TB of int16
    (tmp_path / "a.nii.gz").write_bytes(compress(bytes(raw)))
    with pytest.raises(InputError, match="promises"):
        read_nifti(tmp_path / "a.nii.gz")


def test_a_volume_of_one_slice_is_turned_to_what_torch_takes():
    turned = to_ras(np.zeros((1, 4, 1, 3), np.float32), np.diag([-1, -1, 1, 1]))
    assert torch.from_numpy(np.ascontiguousarray(turned)[:, :, :0]).shape == (1, 4, 0, 3)


def damaged(data: bytes) -> bytes:
    return data[:5000] + bytes([data[5000] ^ 255]) + data[5001:]


@pytest.mark.parametrize("ending", [b"", b"\n<!-- end -->"])
@pytest.mark.parametrize("spoil", [damaged, lambda data: data[:-4], lambda data: data[: len(data) // 2]])
def test_a_damaged_stream_is_refused_whatever_follows_it(tmp_path, spoil, ending):
    raw = nibabel.Nifti1Image(make_head()[0]["t1"], LPS).to_bytes()
    (tmp_path / "a.nii.gz").write_bytes(spoil(gzip.compress(raw)) + ending)
    with pytest.raises(InputError, match="truncated or damaged"):
        read_nifti(tmp_path / "a.nii.gz")


def with_codes(path, sform, qform, sform_code, qform_code):
    image = nibabel.Nifti1Image(make_head()[0]["t1"], LPS)
    image.set_sform(sform, code=sform_code)
    image.set_qform(qform, code=qform_code)
    nibabel.save(image, path)


def test_a_header_without_orientation_is_told(tmp_path):
    with_codes(tmp_path / "a.nii.gz", LPS, LPS, 0, 0)
    with pytest.warns(InputWarning, match=r"a\.nii\.gz: sform and qform codes are 0"):
        read_nifti(tmp_path / "a.nii.gz")


def test_sform_and_qform_that_disagree_are_told_with_both(tmp_path):
    with_codes(tmp_path / "a.nii.gz", LPS, np.eye(4), 1, 1)
    with pytest.warns(InputWarning, match=r"sform \[-1 0 0 0; .*qform \[1 0 0 0; .*the sform is used"):
        affine = read_nifti(tmp_path / "a.nii.gz")[1]
    assert np.array_equal(affine, LPS)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("sform_code", "qform_code"), [(1, 1), (2, 0), (0, 1)])
def test_one_form_is_enough_and_two_that_agree_are_fine(tmp_path, sform_code, qform_code):
    with_codes(tmp_path / "a.nii.gz", LPS, LPS, sform_code, qform_code)
    assert np.allclose(read_nifti(tmp_path / "a.nii.gz")[1], LPS)


@pytest.mark.parametrize("value", [0.97, 1.002, np.nan, np.inf, 65537.0])
def test_what_is_no_label_map_is_refused_in_one_line(tmp_path, value):
    voxels = np.zeros((4, 5, 6), np.float32)
    voxels[1, 2, 3] = value
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(InputError, match=r"a\.nii\.gz: .* Give a label map") as caught:
        read_label(tmp_path / "a.nii.gz")
    assert "\n" not in str(caught.value)


# ---- grids ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR", "PIL", "IPR"])
def test_voxels_in_another_axis_order_are_turned_onto_the_grid(codes):
    voxels = make_head()[0]["t1"]
    other, its_affine = turned(voxels, LPS, codes)
    assert np.array_equal(onto_grid(other, its_affine, voxels.shape, LPS), voxels)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.9, 0.9, 3)])
def test_an_oblique_grid_is_turned_too(spacing):
    angle = np.deg2rad(40)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(spacing)
    voxels = make_head()[0]["t1"]
    flipped = affine @ np.array([[0, -1.0, 0, 43], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])  # from [Y, -X, Z]
    assert np.array_equal(onto_grid(voxels[::-1].transpose(1, 0, 2), flipped, voxels.shape, affine), voxels)


def test_voxels_at_another_place_are_not_turned():
    voxels = make_head()[0]["t1"]
    moved = LPS.copy()
    moved[0, 3] += 1
    for affine in (np.eye(4), moved, LPS @ np.diag([2.0, 1, 1, 1])):
        assert onto_grid(voxels, affine, voxels.shape, LPS) is None
    assert onto_grid(voxels[1:], LPS, voxels.shape, LPS) is None


# ---- writing -------------------------------------------------------------------------------------------------------


def test_a_label_map_written_and_read_by_nibabel_is_the_same(tmp_path):
    label = make_head()[1]
    write_label_nifti(tmp_path / "a.nii.gz", label, LPS)
    image = nibabel.load(tmp_path / "a.nii.gz")
    assert np.array_equal(np.asarray(image.dataobj), label) and np.array_equal(image.affine, LPS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii.gz"]


def test_an_interrupted_write_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "x.json", "{}")
    assert not list(tmp_path.iterdir())
