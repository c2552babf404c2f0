"""Finding, reading and refusing raw cases."""

import gzip
import json
import os
import shutil

import nibabel
import numpy as np
import pytest
from conftest import LPS, make_head, write_raw_case

from models import brats
from models.brats import find_cases, read_case, read_label, read_nifti, to_raw_labels, to_training_labels
from models.errors import InputError


@pytest.mark.parametrize("layout", ["brats2021", "brats2020", "brats2023"])
def test_a_case_is_found_and_read_in_channel_order_whatever_the_names(tmp_path, layout):
    _, volumes, label = write_raw_case(tmp_path, "Case_001", layout)
    (case,) = find_cases(tmp_path)
    found = read_case(case)
    for channel, modality in enumerate(("t1", "t1ce", "t2", "flair")):
        assert np.array_equal(found.image[channel], volumes[modality])
    assert np.array_equal(to_training_labels(found.label, case.layout), label)
    assert np.array_equal(found.affine, LPS)


def write_msd(folder, volumes, label):
    """MSD Task01 keeps FLAIR first, and calls oedema 1 and the non-enhancing core 2."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    stacked = np.stack([volumes[m] for m in ("flair", "t1", "t1ce", "t2")], axis=-1)
    nibabel.save(nibabel.Nifti1Image(stacked, LPS), folder / "imagesTr/BRATS_001.nii.gz")
    (folder / "imagesTr/._BRATS_001.nii.gz").write_bytes(b"macOS")
    msd_label = np.array([0, 2, 1, 3], np.uint8)[label]
    nibabel.save(nibabel.Nifti1Image(msd_label, LPS), folder / "labelsTr/BRATS_001.nii.gz")
    modality = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
    (folder / "dataset.json").write_text(json.dumps({"modality": modality}))


def test_msd_channels_and_labels_become_ours(tmp_path):
    volumes, label = make_head()
    write_msd(tmp_path, volumes, label)
    (case,) = find_cases(tmp_path)
    found = read_case(case)
    assert np.array_equal(found.image[0], volumes["t1"]) and np.array_equal(found.image[3], volumes["flair"])
    assert np.array_equal(to_training_labels(found.label, "msd"), label)


def test_a_dataset_json_of_something_else_is_refused(tmp_path):
    (tmp_path / "dataset.json").write_text('{"modality": {"0": "CT"}}')
    with pytest.raises(InputError, match=r"dataset\.json"):
        find_cases(tmp_path)


def test_cases_are_found_at_any_depth_and_hidden_files_are_not(tmp_path):
    write_raw_case(tmp_path / "MICCAI/HGG", "Brats18_TCIA01_201_1")
    write_raw_case(tmp_path / "MICCAI/LGG", "Brats18_2013_0_1")
    (tmp_path / "MICCAI/LGG/Brats18_2013_0_1/._Brats18_2013_0_1_t1.nii.gz").write_bytes(b"macOS")
    assert [case.name for case in find_cases(tmp_path)] == ["Brats18_2013_0_1", "Brats18_TCIA01_201_1"]
    read_case(find_cases(tmp_path)[0])


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_are_followed_and_one_that_leads_back_ends(tmp_path):
    write_raw_case(tmp_path / "elsewhere", "A")
    (tmp_path / "subset").mkdir()
    (tmp_path / "subset/A").symlink_to(tmp_path / "elsewhere/A")
    (tmp_path / "subset/round").symlink_to(tmp_path / "subset")
    assert [case.name for case in find_cases(tmp_path / "subset")] == ["A"]


def test_the_misnamed_segmentation_of_brats_2020_case_355_is_found(tmp_path):
    folder, _, _ = write_raw_case(tmp_path, "BraTS20_Training_355", "brats2020")
    (folder / "BraTS20_Training_355_seg.nii").rename(folder / "W39_1998.09.19_Segm.nii")
    (case,) = find_cases(tmp_path)
    assert case.labelled


@pytest.mark.parametrize(
    ("case", "patient"),
    [
        ("BraTS-GLI-00005-001", "BraTS-GLI-00005"),
        ("Brats18_TCIA01_201_1", "Brats18_TCIA01_201"),
        ("BraTS19_CBICA_AAB_1", "BraTS19_CBICA_AAB"),
        ("BraTS2021_00000", "BraTS2021_00000"),
        ("BraTS20_Training_001", "BraTS20_Training_001"),
        ("BRATS_001", "BRATS_001"),
    ],
)
def test_visits_of_one_patient_are_known_by_the_case_name(case, patient):
    assert brats.Case(case, "brats2021", {}).patient == patient


def test_label_schemes_give_the_meaning_that_each_data_set_documents():
    raw = np.array([0, 1, 2, 3, 4], np.int16)
    assert to_training_labels(raw[[0, 1, 2, 4]], "brats2021").tolist() == [0, 1, 2, 3]
    assert to_training_labels(raw[:4], "brats2023").tolist() == [0, 1, 2, 3]
    assert to_training_labels(raw, "brats2024").tolist() == [0, 1, 2, 3, 0]  # 4: resection cavity
    assert to_training_labels(raw[:4], "msd").tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("scheme", ["brats2021", "brats2023", "msd"])
def test_training_labels_go_back_to_the_raw_values(scheme):
    raw = np.array(sorted(brats.LABEL_SCHEMES[scheme]), np.int16)
    assert np.array_equal(to_raw_labels(to_training_labels(raw, scheme), scheme), raw)


def test_an_unknown_label_value_is_refused_with_the_schemes_that_would_fit():
    with pytest.raises(InputError, match=r"value 4 is not one of \[0, 1, 2, 3\].*--labels brats2021 or brats2024"):
        to_training_labels(np.array([0, 1, 2, 4], np.int16), "brats2023")
    with pytest.raises(InputError, match="label value -1"):
        to_training_labels(np.array([0, -1], np.int16), "brats2021")


def test_a_label_map_written_and_read_by_nibabel_is_the_same(tmp_path):
    label = make_head()[1]
    brats.write_label_nifti(tmp_path / "a.nii.gz", label, LPS)
    image = nibabel.load(tmp_path / "a.nii.gz")
    assert np.array_equal(np.asarray(image.dataobj), label) and np.array_equal(image.affine, LPS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii.gz"]


def test_scaled_nifti_files_are_read_as_nibabel_reads_them(tmp_path):
    image = nibabel.Nifti1Image(make_head()[0]["t1"].astype(np.float32) * 0.37, LPS)
    image.set_data_dtype(np.int16)  # nibabel then stores a slope
    nibabel.save(image, tmp_path / "a.nii.gz")
    assert np.array_equal(read_nifti(tmp_path / "a.nii.gz")[0], nibabel.load(tmp_path / "a.nii.gz").get_fdata())


# ---- what is refused -----------------------------------------------------------------------------------------------


def rewrite(path, voxels, affine=LPS):
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


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
    "NaN": (lambda p: rewrite(p, np.full((44, 48, 40), np.nan, np.float32)), "NaN"),
    "zero": (lambda p: rewrite(p, np.zeros((44, 48, 40), np.int16)), "zero"),
    "a singular affine": (lambda p: flatten_affine(p), "affine is singular"),
    "missing": (lambda p: p.unlink(), "has no t2 file"),
    "double": (lambda p: shutil.copy(p, p.with_suffix("")), "two files for t2"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path, damage):
    folder, _, _ = write_raw_case(tmp_path, "C")
    spoil, reason = DAMAGE[damage]
    spoil(folder / "C_t2.nii.gz")
    with pytest.raises(InputError, match=reason) as caught:
        read_case(find_cases(tmp_path)[0])
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_segmentation_of_fractions_is_refused(tmp_path):
    folder, _, label = write_raw_case(tmp_path, "C")
    rewrite(folder / "C_seg.nii.gz", label.astype(np.float32) * 0.5)
    with pytest.raises(InputError, match="not whole numbers"):
        read_case(find_cases(tmp_path)[0])


def test_a_segmentation_that_scaling_has_moved_by_a_hair_is_rounded(tmp_path):
    folder, _, label = write_raw_case(tmp_path, "C")
    raw = np.where(label == 3, 4, label)
    rewrite(folder / "C_seg.nii.gz", (raw * np.float32(1.0000153)).astype(np.float32))
    read = read_case(find_cases(tmp_path)[0]).label
    assert read.dtype == np.int16 and np.array_equal(read, raw)


@pytest.mark.parametrize("value", [0.97, 1.002, np.nan, np.inf, 65537.0])
def test_what_is_no_label_map_is_refused_in_one_line(tmp_path, value):
    voxels = np.zeros((4, 5, 6), np.float32)
    voxels[1, 2, 3] = value
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(InputError, match=r"a\.nii\.gz: .* Give a label map") as caught:
        read_label(tmp_path / "a.nii.gz")
    assert "\n" not in str(caught.value)


def test_a_folder_without_cases_or_with_one_twice_is_refused(tmp_path):
    with pytest.raises(InputError, match="no BraTS case"):
        find_cases(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        find_cases(tmp_path / "nowhere")
    write_raw_case(tmp_path / "a", "C")
    write_raw_case(tmp_path / "b", "C")
    with pytest.raises(InputError, match="twice"):
        find_cases(tmp_path)


def test_an_interrupted_write_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(brats.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        brats.write_atomically(tmp_path / "x.json", "{}")
    assert not list(tmp_path.iterdir())
