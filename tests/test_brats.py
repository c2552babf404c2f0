"""What raw label values mean, and which cases are of one patient."""

from pathlib import Path

import numpy as np
import pytest

from models.brats import LABEL_SCHEMES, cohort_scheme, patient_of
from models.errors import InputError
from models.labels import to_raw_labels, to_training_labels

NCR, ED, ET = 1, 2, 3


def test_label_schemes_give_the_meaning_that_each_data_set_documents():
    raw = np.array([0, 1, 2, 3, 4], np.int16)
    assert to_training_labels(raw[[0, 1, 2, 4]], "brats2021").tolist() == [0, NCR, ED, ET]
    assert to_training_labels(raw[:4], "brats2023").tolist() == [0, NCR, ED, ET]
    assert to_training_labels(raw, "brats2024").tolist() == [0, NCR, ED, ET, 0]  # 4: resection cavity
    assert to_training_labels(raw[:4], "msd").tolist() == [0, ED, NCR, ET]


def test_the_pediatric_tumour_core_is_enhancing_non_enhancing_and_cyst():
    """As in the evaluation of BraTS-PED: ET 1, non-enhancing 2, cyst 3, oedema 4; TC is 1 + 2 + 3, WT 1 to 4."""
    raw = np.array([0, 1, 2, 3, 4], np.uint8)
    label = to_training_labels(raw, "brats-ped")
    assert raw[label == ET].tolist() == [1] and raw[np.isin(label, (NCR, ET))].tolist() == [1, 2, 3]
    assert raw[label == ED].tolist() == [4]


@pytest.mark.parametrize("scheme", ["brats2021", "brats2023", "msd"])
def test_training_labels_go_back_to_the_raw_values(scheme):
    raw = np.array(sorted(LABEL_SCHEMES[scheme]), np.int16)
    assert np.array_equal(to_raw_labels(to_training_labels(raw, scheme), scheme), raw)


def test_where_two_raw_values_have_one_meaning_predictions_get_the_first():
    assert to_raw_labels(np.array([0, NCR, ED, ET]), "brats-ped").tolist() == [0, 2, 4, 1]
    assert to_raw_labels(np.array([0, NCR, ED, ET]), "brats2024").tolist() == [0, 1, 2, 3]


def test_an_unknown_label_value_is_refused_with_every_scheme_not_with_one_that_would_fit():
    with pytest.raises(InputError, match=r"value 4 is not one of \[0, 1, 2, 3\]") as caught:
        to_training_labels(np.array([0, 1, 2, 4], np.int16), "brats2023", flag="--prediction-labels")
    assert all(scheme in str(caught.value) for scheme in LABEL_SCHEMES) and "--prediction-labels" in str(caught.value)
    with pytest.raises(InputError, match="label value -1"):
        to_training_labels(np.array([0, -1], np.int16), "brats2021")


@pytest.mark.parametrize(
    ("case", "scheme"),
    [
        ("BraTS-GLI-00005-001", "brats2023"),
        ("BraTS-GLI-00005-100", "brats2024"),  # visits from 100 on are after treatment
        ("BraTS_GLI_00005_100", "brats2024"),
        ("BraTS-SSA-00002-000", "brats2023"),
        ("BraTS-MEN-00004-000", "brats2023"),
        ("BraTS-MET-00001-000", "brats2024"),
        ("BraTS-PED-00001-000", "brats-ped"),
        ("BraTS-GoAT-00001", "brats2023"),
        ("brats-ped-00001-000", "brats-ped"),
        ("BRATS_Mets_BraTS-MET-00001-000", "brats2024"),
        ("BraTS2021_00001", ""),
        ("BraTS20_Training_001", ""),
        ("BRATS_001", ""),
        ("BraTS-XYZ-00001-000", ""),
    ],
)
def test_the_cohort_in_the_name_says_what_the_labels_mean(case, scheme):
    assert cohort_scheme(case, Path("data") / case / f"{case}-t1n.nii.gz") == scheme


@pytest.mark.parametrize("folder", ["ASNR-MICCAI-BraTS2023-PED-Challenge-TrainingData", "BraTS-PEDs-2023", "PED_2023"])
def test_the_pediatric_release_of_2023_is_known_by_its_folder(folder):
    path = Path(folder) / "BraTS-PED-00002-000/BraTS-PED-00002-000-t1n.nii.gz"
    assert cohort_scheme("BraTS-PED-00002-000", path) == "brats2023"
    assert cohort_scheme("BraTS-PED-00002-000", Path("BraTS-PEDs2024_Training") / path.name) == "brats-ped"


def test_of_two_folders_that_name_a_year_the_nearest_says_which_pediatric_release_it_is():
    name = "BraTS-PED-00002-000"
    assert cohort_scheme(name, Path("BraTS2023/BraTS-PEDs2024_Training") / name / "x.nii") == "brats-ped"
    assert cohort_scheme(name, Path("BraTS2024/BraTS2023-PED") / name / "x.nii") == "brats2023"


@pytest.mark.parametrize(
    ("case", "patient"),
    [
        ("BraTS-GLI-00005-001", "BraTS-GLI-00005"),
        ("BraTS-MEN-RT-0002-1", "BraTS-MEN-RT-0002"),
        ("Brats18_TCIA01_201_1", "Brats18_TCIA01_201"),
        ("BraTS19_CBICA_AAB_1", "BraTS19_CBICA_AAB"),
        ("UPENN-GBM-00001_21", "UPENN-GBM-00001"),
        ("UCSF-PDGM-0396_FU016d", "UCSF-PDGM-0396"),
        ("UCSF-PDGM-0396", "UCSF-PDGM-0396"),
        ("BraTS_GLI_00005_101", "BraTS_GLI_00005"),
        ("sub-01_ses-2_run-1", "sub-01"),
        ("Patient-001_week-000-1", "Patient-001"),
        ("PatientID_0003_Timepoint_1_brain", "PatientID_0003"),
        ("hospital_visit1_001", "hospital_visit1_001"),  # what follows tells patients apart
        ("BraTS20_Training_001", "BraTS20_Training_001"),
        ("BRATS_001", "BRATS_001"),
    ],
)
def test_visits_of_one_patient_are_known_by_the_case_name(case, patient):
    assert patient_of(case) == patient


def test_a_glioma_has_one_patient_under_its_names_of_2021_and_2023():
    assert patient_of("BraTS2021_00005") == patient_of("BraTS-GLI-00005-000")
    assert patient_of("BraTS2021_00006") != patient_of("BraTS-GLI-00005-000")
