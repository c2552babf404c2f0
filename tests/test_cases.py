"""Finding raw cases in folders, and what their labels mean."""

import json
import os
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import LPS, make_head, write_raw_case

from models.cases import find_cases, scheme_of
from models.errors import InputError, InputWarning
from models.labels import to_training_labels
from models.volumes import read_case

MODALITIES = ("t1", "t1ce", "t2", "flair")


def save(path: Path, voxels, affine=LPS):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


def write_scans(pattern: Path, words: dict[str, str], seed=0, raw_values=(0, 1, 2, 4)):
    """One head, each scan under a name of its own: `words` is role -> what takes the place of {} in `pattern`. Returns
    volumes and training labels."""
    volumes, label = make_head(seed)
    scans = volumes | {"seg": np.array(raw_values, np.uint8)[label]}
    for role, word in words.items():
        save(Path(str(pattern).format(word)), scans[role])
    return volumes, label


def assert_is(case, volumes, label):
    """Reading the case gives these volumes in channel order, and these training labels."""
    found = read_case(case)
    for channel, modality in enumerate(MODALITIES):
        assert np.array_equal(found.image[channel], volumes[modality]), modality
    assert np.array_equal(to_training_labels(found.label, scheme_of(case)), label)


@pytest.mark.parametrize("layout", ["brats2021", "brats2020", "brats2023"])
def test_a_case_is_found_and_read_in_channel_order_whatever_the_names(tmp_path, layout):
    _, volumes, label = write_raw_case(tmp_path, "BraTS-GLI-00001-000" if layout == "brats2023" else "Case_001", layout)
    (case,) = find_cases(tmp_path)
    assert_is(case, volumes, label)
    assert np.array_equal(read_case(case).affine, LPS)


ALIASES = {
    "T1GD": ("C/C_{}.nii.gz", ("T1", "T1GD", "T2", "FLAIR", "segm")),
    "t1c beside t1": ("C/C_{}.nii", ("t1", "t1c", "t2", "flair", "seg")),
    "UCSF-PDGM": ("C/C_{}.nii.gz", ("T1", "T1c", "T2", "FLAIR", "tumor_segmentation")),
    "names of 2021 with hyphens": ("C/C-{}.nii.gz", ("t1", "t1ce", "t2", "flair", "seg")),
    "before and after contrast": ("C/C_{}.nii.gz", ("T1pre", "T1_POST", "T2", "FLAIR", "seg")),
    "bare": ("C/{}.nii.gz", ("t1", "t1c", "t2", "flair", "seg")),
    "bare capitals": ("C/{}.nii", ("T1", "T1GD", "T2", "T2-FLAIR", "SEG")),
    "one folder for all": ("C_{}.nii.gz", ("t1", "t1ce", "t2", "flair", "seg")),
    "a folder per scan": ("C/C_{0}.nii/00000057_brain_{0}.nii", ("t1", "t1ce", "t2", "flair", "seg")),
    "a folder per zipped scan": ("C/C_{0}.nii.gz/{0}_final.nii.gz", ("t1", "t1ce", "t2", "flair", "seg")),
    "segmentations elsewhere": ("{}.nii.gz", ("a/C/C_T1", "a/C/C_T1GD", "a/C/C_T2", "a/C/C_FLAIR", "b/C_segm")),
    "a segmentation with a name of its own": ("C/{}.nii", ("C_t1", "C_t1ce", "C_t2", "C_flair", "W39_1998.09.19_Segm")),
}


@pytest.mark.filterwarnings("ignore::models.errors.InputWarning")
@pytest.mark.parametrize("kind", ALIASES)
def test_other_names_of_the_same_scans_are_known(tmp_path, kind):
    pattern, words = ALIASES[kind]
    volumes, label = write_scans(tmp_path / pattern, dict(zip((*MODALITIES, "seg"), words, strict=True)))
    (case,) = find_cases(tmp_path)
    assert case.name == "C"
    assert_is(case, volumes, label)


def test_segmentations_from_another_folder_are_told(tmp_path):
    write_scans(tmp_path / "images/C_{}.nii", {m: m for m in MODALITIES})
    write_scans(tmp_path / "segmentations/C_{}.nii", {"seg": "seg"})
    with pytest.warns(InputWarning, match=r"segmentations: 1 segmentations lie in another folder"):
        find_cases(tmp_path)


def test_a_stray_segmentation_is_not_given_to_several_cases(tmp_path):
    for case in ("A", "B"):
        write_scans(tmp_path / (case + "_{}.nii"), {m: m for m in MODALITIES})
    write_scans(tmp_path / "C_{}.nii", {"seg": "segm"})
    assert not any(case.labelled for case in find_cases(tmp_path))


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


def test_a_folder_without_cases_or_with_one_twice_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no BraTS case found: there is no \.nii"):
        find_cases(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        find_cases(tmp_path / "nowhere")
    write_raw_case(tmp_path / "a", "C")
    write_raw_case(tmp_path / "b", "C")
    with pytest.raises(InputError, match="twice"):
        find_cases(tmp_path)


def test_bare_names_in_folders_of_one_name_are_refused_with_what_to_do_where_they_are_two_patients(tmp_path):
    for patient in ("sub-01", "sub-02"):
        write_scans(tmp_path / patient / "ses-1/{}.nii", {m: m for m in MODALITIES})
    with pytest.raises(InputError, match=r"ses-1 is there twice, in .*sub-01.* and .*sub-02.*rename the files"):
        find_cases(tmp_path)


def test_hidden_folders_are_left_out_and_locked_ones_told(tmp_path, monkeypatch):
    write_raw_case(tmp_path, "A")
    write_raw_case(tmp_path / ".Trash-1000/files", "A")
    (tmp_path / "locked").mkdir()
    scan = os.scandir

    def refusing(path):  # root may open everything
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.warns(InputWarning, match="locked: left out: Permission denied"):
        (case,) = find_cases(tmp_path)
    assert case.source_files[0].parent == tmp_path / "A"


def test_where_there_is_no_case_it_is_told_what_there_is(tmp_path):
    (tmp_path / "BraTS2021_Training_Data.tar").write_bytes(b"tar")
    with pytest.raises(InputError, match=r"there is no \.nii or \.nii\.gz file, but BraTS2021_Training_Data\.tar"):
        find_cases(tmp_path)
    with pytest.raises(InputError, match="not a folder"):
        find_cases(tmp_path / "BraTS2021_Training_Data.tar")
    save(tmp_path / "scan_0.nii", make_head()[0]["t1"])
    with pytest.raises(InputError, match=r"1 NIfTI files, but names like scan_0\.nii do not say"):
        find_cases(tmp_path)
    save(tmp_path / "C_seg.nii", make_head()[1])
    with pytest.raises(InputError, match="only segmentations, such as that of C"):
        find_cases(tmp_path)


# ---- dataset.json --------------------------------------------------------------------------------------------------

MSD_MODALITY = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}


def write_msd(folder, description, raw_values=(0, 2, 1, 3)):
    """MSD Task01 keeps FLAIR first, and calls oedema 1 and the non-enhancing core 2."""
    volumes, label = make_head()
    save(folder / "imagesTr/BRATS_001.nii.gz", np.stack([volumes[m] for m in ("flair", "t1", "t1ce", "t2")], axis=-1))
    (folder / "imagesTr/._BRATS_001.nii.gz").write_bytes(b"macOS")
    save(folder / "labelsTr/BRATS_001.nii.gz", np.array(raw_values, np.uint8)[label])
    (folder / "dataset.json").write_text(json.dumps(description))
    return volumes, label


def test_msd_channels_and_labels_become_ours(tmp_path):
    volumes, label = write_msd(tmp_path / "Task01_BrainTumour", {"modality": MSD_MODALITY})
    (case,) = find_cases(tmp_path)
    assert_is(case, volumes, label)


CHANNELS = {"0": "T1", "1": "T1ce", "2": "T2", "3": "Flair"}
DECLARED = {  # what dataset.json says -> the raw values of NCR, ED and ET
    "regions": ({"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": 3}, (2, 1, 3)),
    "regions, core first": ({"background": 0, "whole_tumor": [1, 2, 3], "TC": [1, 3], "ET": [3]}, (1, 2, 3)),
    "labels": ({"background": 0, "NCR": 1, "edema": 2, "enhancing tumor": 3}, (1, 2, 3)),
    "labels of nnU-Net 1": ({"0": "background", "1": "edema", "2": "necrosis", "3": "enhancing"}, (2, 1, 3)),
    "children": ({"background": 0, "ET": 1, "NonEnh": 2, "Cystic": 3, "Edema": 4}, (3, 4, 1)),
    "after treatment": ({"background": 0, "NETC": 1, "SNFH": 2, "ET": 3, "RC": 4}, (1, 2, 3)),
}


def write_nnunet(folder, labels, raw_values, channels="channel_names", name="case_001"):
    for number, word in enumerate(MODALITIES):
        volumes, label = write_scans(folder / "imagesTr" / (name + "_{}.nii.gz"), {word: f"{number:04d}"})
    save(folder / "labelsTr" / f"{name}.nii.gz", np.array((0, *raw_values), np.uint8)[label])
    (folder / "dataset.json").write_text(json.dumps({channels: CHANNELS, "labels": labels, "file_ending": ".nii.gz"}))
    return volumes, label


@pytest.mark.parametrize("kind", DECLARED)
@pytest.mark.parametrize("channels", ["channel_names", "modality"])
def test_the_raw_format_of_nnunet_is_read_with_the_labels_that_its_dataset_json_declares(tmp_path, kind, channels):
    volumes, label = write_nnunet(tmp_path / "Dataset001_BraTS", *DECLARED[kind], channels)
    (case,) = find_cases(tmp_path)
    assert_is(case, volumes, label)


def test_labels_that_a_dataset_json_does_not_explain_are_refused_whatever_the_case_is_called(tmp_path):
    write_nnunet(tmp_path, {"background": 0, "tumour": 1}, (1, 1, 1), name="BraTS-GLI-00001-000")
    (case,) = find_cases(tmp_path)
    with pytest.raises(InputError, match=r"labels in its dataset\.json are not those of a known data set.*--labels"):
        scheme_of(case)
    (case,) = find_cases(tmp_path, labels="brats2023")
    assert scheme_of(case) == "brats2023"


def test_a_stray_file_among_the_channels_of_nnunet_is_left_out_and_told(tmp_path):
    volumes, label = write_nnunet(tmp_path, *DECLARED["labels"])
    (tmp_path / "imagesTr/case_001_0000_old.nii.gz").write_bytes(b"a copy")
    with pytest.warns(InputWarning, match=r"imagesTr.case_001_0000_old\.nii\.gz: 1 files that do not end in _0000"):
        (case,) = find_cases(tmp_path)
    assert_is(case, volumes, label)


def test_a_dataset_json_written_on_windows_is_read(tmp_path):
    volumes, label = write_msd(tmp_path, {"modality": MSD_MODALITY})
    (tmp_path / "dataset.json").write_text(json.dumps({"modality": MSD_MODALITY}), encoding="utf-8-sig")
    (case,) = find_cases(tmp_path)
    assert_is(case, volumes, label)


def test_channels_that_a_dataset_json_does_not_name_are_refused_with_the_names_that_it_needs(tmp_path):
    write_nnunet(tmp_path, *DECLARED["labels"])
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": dict.fromkeys("0123", "zscore")}))
    with pytest.raises(InputError, match=r"channels zscore, zscore.*call them T1, T1CE, T2 and FLAIR"):
        find_cases(tmp_path)


@pytest.mark.parametrize("text", ['{"modality": {"0": "CT"}}', '{"training": []}', "[1, 2]", "no json", "\xff"])
def test_a_dataset_json_of_something_else_is_refused_where_there_is_nothing_else(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"dataset\.json"):
        find_cases(tmp_path)


@pytest.mark.parametrize("text", ['{"modality": {"0": "CT"}}', '{"training": []}', "no json"])
def test_a_dataset_json_of_something_else_beside_good_cases_is_told_and_not_used(tmp_path, text):
    _, volumes, label = write_raw_case(tmp_path, "BraTS2021_00001")
    (tmp_path / "dataset.json").write_text(text)
    with pytest.warns(InputWarning, match=r"not used: .*dataset\.json"):
        (case,) = find_cases(tmp_path)
    assert_is(case, volumes, label)


# ---- what labels mean ----------------------------------------------------------------------------------------------


def test_pediatric_labels_are_mapped_by_name_though_no_case_shows_a_4(tmp_path):
    """1 is the enhancing tumour in children; with the names of 2023 nothing in the values would contradict NCR."""
    words = dict(zip((*MODALITIES, "seg"), ("t1n", "t1c", "t2w", "t2f", "seg"), strict=True))
    _, label = write_scans(tmp_path / "BraTS-PED-00001-000-{}.nii.gz", words, raw_values=(0, 3, 2, 1))
    (case,) = find_cases(tmp_path)
    read = to_training_labels(read_case(case).label, scheme_of(case))
    assert np.array_equal(read == 3, label == 3) and not (read == 2).any()  # 2: non-enhancing, not oedema


def test_a_cohort_that_is_not_known_is_refused_with_the_known_ones_and_the_flag(tmp_path):
    write_raw_case(tmp_path, "BraTS-XYZ-00001-000", "brats2023")
    (case,) = find_cases(tmp_path)
    with pytest.raises(InputError, match=r"XYZ is not one of GLI, GoAT, MEN, MET, PED, SSA.*--labels: brats2021"):
        scheme_of(case)
    (case,) = find_cases(tmp_path, labels="brats2023")
    assert scheme_of(case) == "brats2023"


def test_names_of_2023_without_a_cohort_are_refused_if_there_are_labels(tmp_path):
    folder, _, _ = write_raw_case(tmp_path, "Case_001", "brats2023")
    with pytest.raises(InputError, match="no cohort"):
        scheme_of(find_cases(tmp_path)[0])
    (folder / "Case_001-seg.nii.gz").unlink()
    assert scheme_of(find_cases(tmp_path)[0]) == "brats2023"  # what a prediction of it would be written as


def test_meningiomas_for_radiotherapy_are_refused_with_the_reason(tmp_path):
    write_scans(tmp_path / "BraTS-MEN-RT-0001-1_{}.nii.gz", {"t1ce": "t1c", "seg": "gtv"})
    with pytest.raises(InputError, match=r"one modality \(t1c\) and one label"):
        scheme_of(find_cases(tmp_path)[0])


def test_older_names_have_the_labels_of_2021(tmp_path):
    for case in ("BraTS2021_00001", "BraTS20_Training_001", "UPENN-GBM-00001_11", "patient1"):
        write_raw_case(tmp_path, case)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {scheme_of(case) for case in find_cases(tmp_path)} == {"brats2021"}
