"""A cohort on its way through the preprocessing: what is refused before the work, what is told after it, and who is one
patient."""

import csv
import os

import nibabel
import numpy as np
import pytest
from conftest import LPS, make_head, run_script, write_raw_case
from test_nifti import turned

from models import cohort
from models.cases import find_cases
from models.cohort import describe, fingerprint, fitting_workers
from models.manifest import join_patients, make_splits
from models.volumes import Volumes, read_case

MODALITIES = ("t1", "t1ce", "t2", "flair")
SCRIPT = "preprocess_brats.py"


def rewrite(path, change):
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(change(np.asarray(image.dataobj)), image.affine), path)


def with_noise(volume):
    noise = np.abs(np.random.default_rng(0).normal(0, 6, volume.shape)) + 1
    return np.where(volume != 0, volume, noise).astype(np.float32)


def with_stray_voxels(label):
    label = label.copy()
    label[0, 0, :5] = 2
    return label


def test_what_is_doubtful_is_done_and_kept_in_warnings_csv(tmp_path):
    for index in range(5):
        write_raw_case(tmp_path / "raw", f"BraTS2021_{index:05d}", seed=index)
    for modality in MODALITIES:
        rewrite(tmp_path / f"raw/BraTS2021_00001/BraTS2021_00001_{modality}.nii.gz", with_noise)
        rewrite(tmp_path / f"raw/BraTS2021_00002/BraTS2021_00002_{modality}.nii.gz", lambda v: np.where(v != 0, v, -9))
    rewrite(tmp_path / "raw/BraTS2021_00003/BraTS2021_00003_seg.nii.gz", with_stray_voxels)
    command = (SCRIPT, "raw", "out", "--size", 16, "--workers", 1)
    for _ in range(2):  # the second run finds everything done
        result = run_script(*command, cwd=tmp_path)
        with (tmp_path / "out/warnings.csv").open() as file:
            rows = {row["case"]: f"{row['about']}: {row['warning']}" for row in csv.DictReader(file)}
        assert rows.keys() == {"BraTS2021_00001", "BraTS2021_00002", "BraTS2021_00003"}
        assert rows["BraTS2021_00001"].startswith("t1, t1ce, t2, flair: the corners of the volume")
        assert rows["BraTS2021_00002"].startswith("t1 -9, t1ce -9, t2 -9, flair -9: the constant around the head")
        assert rows["BraTS2021_00003"].startswith("segmentation, 5 of ")
        told = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
        assert len(told) == 3 and all("warnings.csv" in line for line in told)
        assert (tmp_path / "out/splits.json").exists() and not (tmp_path / "out/failures.csv").exists()


def test_labels_without_a_known_meaning_are_refused_before_anything_is_written(tmp_path):
    write_raw_case(tmp_path / "raw", "BraTS-GLI-00001-000", "brats2023")
    write_raw_case(tmp_path / "raw", "BraTS-XYZ-00001-000", "brats2023")
    refused = run_script(SCRIPT, "raw", "out", "--size", 16, cwd=tmp_path, status=2)
    assert len(refused.stderr.splitlines()) == 1 and "--labels" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_what_the_labels_of_each_cohort_become_is_printed(tmp_path, capsys):
    for case in ("BraTS-GLI-00001-000", "BraTS-GLI-00002-000", "BraTS-PED-00001-000"):
        write_raw_case(tmp_path, case, "brats2023")
    assert describe(find_cases(tmp_path), tmp_path) == {"brats2023": 2, "brats-ped": 1}
    pediatric, glioma = sorted(capsys.readouterr().out.splitlines())
    assert "1 case," in pediatric and "1 = ET, 2 = NCR (non-enhancing), 3 = NCR (cyst), 4 = ED" in pediatric
    assert "2 cases" in glioma and "1 = NCR, 2 = ED, 3 = ET" in glioma


# ---- who is one patient --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_glioma_under_its_names_of_2021_and_2023_stays_in_one_part_of_the_split(seed):
    names = [f"BraTS2021_{number:05d}" for number in range(20)] + [f"BraTS-GLI-{n:05d}-000" for n in range(20)]
    cases = {name: {"patient": name} for name in names}  # as an older manifest may have it
    assert join_patients(cases) == []
    splits = make_splits({name: entry["patient"] for name, entry in cases.items()}, seed, folds=5)
    for part in (splits["train"], splits["validation"], splits["test"]):
        assert {n[-5:] for n in part if "2021" in n} == {n[10:15] for n in part if "GLI" in n}


def test_the_same_scans_under_two_names_are_one_patient_with_all_visits():
    marks = {"A_1": "x", "B": "x", "C": "y", "BraTS-MET-00001-000": "y", "BraTS-MET-00001-001": "z", "D": "", "E": ""}
    cases = {name: {"patient": name, "fingerprint": mark} for name, mark in marks.items()}
    told = join_patients(cases)
    assert cases["A_1"]["patient"] == cases["B"]["patient"]
    assert len({cases[name]["patient"] for name in ("C", "BraTS-MET-00001-000", "BraTS-MET-00001-001")}) == 1
    assert len({entry["patient"] for entry in cases.values()}) == 4  # an empty mark is no mark
    assert [(name, about) for name, about, _ in told] == [("B", "as A_1"), ("C", "as BraTS-MET-00001-000")]


def test_the_fingerprint_of_scans_is_that_of_their_voxels_however_they_are_stored():
    volumes, _ = make_head()
    image = np.stack([volumes[m] for m in MODALITIES])
    mark = fingerprint(Volumes(image, None, LPS))
    assert fingerprint(Volumes(image.astype(np.float32), None, LPS)) == mark
    for codes in ("RAS", "SAR", "PIL"):
        stored = [turned(volume, LPS, codes) for volume in image]
        assert fingerprint(Volumes(np.stack([volume for volume, _ in stored]), None, stored[0][1])) == mark
    image[2, 20, 20, 20] += 1
    assert fingerprint(Volumes(image, None, LPS)) != mark
    assert fingerprint(Volumes(np.zeros_like(image), None, LPS)) == ""


def test_the_fingerprints_of_other_patients_differ(tmp_path):
    for index in range(3):
        write_raw_case(tmp_path, f"BraTS2021_{index:05d}", seed=index)
    assert len({fingerprint(read_case(case)) for case in find_cases(tmp_path)}) == 3


@pytest.mark.parametrize(("shape", "dtype", "gib", "workers"), [
    ((240, 240, 155), np.int16, 4, 7), ((512, 512, 300), np.int16, 4, 2), ((512, 512, 300), np.float32, 4, 1),
    ((512, 512, 300), np.float32, 1, 1), ((512, 512, 300), np.int16, 40, 8), ((240, 240, 155), np.int16, np.nan, 8),
])  # fmt: skip
def test_no_more_workers_start_than_the_memory_holds_of_the_largest_case(
    tmp_path, monkeypatch, shape, dtype, gib, workers
):
    """The header says how large it is; the voxels of this file are a hole in the disk."""
    folder, _, _ = write_raw_case(tmp_path, "C0", layout="brats2020")
    header = nibabel.Nifti1Image(np.zeros((1, 1, 1), dtype), LPS).header
    header.set_data_shape(shape)
    path = folder / "C0_flair.nii"
    path.write_bytes(header.binaryblock + bytes(4))
    os.truncate(path, 352 + np.prod(shape) * np.dtype(dtype).itemsize)
    monkeypatch.setattr(cohort, "free_ram_bytes", lambda: gib * 2**30)
    assert fitting_workers(find_cases(tmp_path), {"size": 128, "spacing_mm": 1.0}, 8) == workers
