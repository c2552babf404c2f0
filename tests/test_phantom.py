"""The synthetic cases: real geometry, tumours that each modality shows, the same bytes for the same seed."""

import hashlib
import json
import subprocess
import sys

import nibabel
import numpy as np
import pytest
from conftest import ROOT
from scipy.ndimage import label as label_parts

from models.cases import find_cases, scheme_of
from models.labels import to_training_labels
from models.phantom import make_case, write_case
from models.volumes import read_case


@pytest.fixture(scope="module")
def cases():
    return [make_case(0, index, spacing_mm=3.0) for index in range(8)]


def test_the_geometry_is_that_of_brats(tmp_path):
    write_case(tmp_path, "brats2021", seed=0, index=0)
    image = nibabel.load(tmp_path / "BraTS2021_00000/BraTS2021_00000_t1.nii.gz")
    assert image.shape == (240, 240, 155) and image.get_data_dtype() == np.int16
    assert nibabel.aff2axcodes(image.affine) == ("L", "P", "S")
    assert np.array_equal(image.affine, [[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])


def test_the_same_seed_gives_the_same_bytes_and_another_another_case(tmp_path):
    def digest(folder, seed):
        write_case(tmp_path / folder, "brats2021", seed, 3, spacing_mm=4.0)
        files = sorted((tmp_path / folder).rglob("*.nii.gz"))
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]

    assert digest("a", 0) == digest("b", 0)
    assert not set(digest("c", 1)) & set(digest("a", 0))


def test_one_case_in_eight_has_no_enhancing_tumour(cases):
    present = [set(np.unique(label)) for _, label, _ in cases]
    assert all({1, 2} <= labels for labels in present)
    assert [3 in labels for labels in present] == [True] * 7 + [False]


def test_whole_tumours_are_one_to_three_parts_of_millilitres_as_those_of_real_cases(cases):
    """Of twelve real cases, ten have one part of more than 50 mm3, the others two and three."""
    voxel_ml = 0.027
    parts = [label_parts(segmentation > 0, np.ones((3, 3, 3))) for _, segmentation, _ in cases]
    sizes_ml = [np.bincount(numbers.ravel())[1:] * voxel_ml for numbers, _ in parts]
    assert {count for _, count in parts} == {1, 2}
    assert all(20 < sizes.sum() < 250 and sizes.min() > 1 for sizes in sizes_ml)


def test_a_head_may_have_three_lesions():
    _, segmentation, _ = make_case(0, 9, spacing_mm=3.0)
    assert label_parts(segmentation > 0, np.ones((3, 3, 3)))[1] == 3


def test_the_tumour_is_in_the_brain_and_the_background_is_zero(cases):
    for volumes, label, _ in cases:
        assert (volumes["t1"][label > 0] != 0).mean() > 0.99
        assert all((volume[:3] == 0).all() and (volume[:, :, -1:] == 0).all() for volume in volumes.values())
        assert all((volume < 0).sum() in range(1, 100) for volume in volumes.values())


def test_each_modality_shows_the_tumour_as_a_radiologist_expects(cases):
    for volumes, label, _ in cases[:7]:
        brain = (volumes["t1"] > 0) & (label == 0)

        def contrast(modality, value, volumes=volumes, label=label, brain=brain):
            return np.median(volumes[modality][label == value]) / np.median(volumes[modality][brain])

        assert contrast("flair", 2) > 1.3 and contrast("t2", 2) > 1.1 and contrast("t1", 2) < 0.95
        assert contrast("t1ce", 3) > 1.3 and contrast("t1", 3) < 1.0
        assert contrast("t1ce", 1) < 0.9


def test_varied_heads_differ_in_contrast_more_than_usual_ones_and_still_enhance(cases):
    def enhancement(case):
        volumes, label, _ = case
        return np.median(volumes["t1ce"][label == 3]) / np.median(volumes["t1ce"][(volumes["t1ce"] > 0) & (label == 0)])

    varied = [make_case(0, index, spacing_mm=3.0, varied=True) for index in range(12)]
    enhancing = [case for case in varied if (case[1] == 3).any()]
    assert 8 <= len(enhancing) < 12  # those without come by chance
    usual, drawn = ([enhancement(case) for case in some] for some in (cases[:7], enhancing))
    assert np.std(drawn) > 2 * np.std(usual) and min(drawn) > 1.05
    sizes_ml = [(label > 0).sum() * 0.027 for _, label, _ in varied]
    assert min(sizes_ml) < 60 and max(sizes_ml) > 150
    assert all((volumes["t1"][label > 0] != 0).mean() > 0.99 for volumes, label, _ in varied)


def test_intensity_ranges_differ_by_case_and_modality():
    tops = [np.percentile(v, 99.9) for i in range(8) for v in make_case(0, i, 5.0)[0].values()]
    assert max(tops) > 4 * min(tops)


@pytest.mark.parametrize("layout", ["brats2021", "brats2020", "brats2023", "msd"])
def test_every_layout_is_found_and_holds_the_same_labels(tmp_path, layout):
    command = [sys.executable, "-c", "from pathlib import Path; from models import phantom; "
               f"phantom.write_case(Path({str(tmp_path)!r}), {layout!r}, 0, 1, 4.0)"]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT)
    if layout == "msd":
        modality = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
        (tmp_path / "dataset.json").write_text(json.dumps({"modality": modality}))
    (case,) = find_cases(tmp_path)
    volumes, label, _ = make_case(0, 1, 4.0)
    found = read_case(case)
    assert np.array_equal(to_training_labels(found.label, scheme_of(case)), label)
    assert np.array_equal(found.image[3], volumes["flair"])


def test_the_command_line_writes_cases_and_refuses_nonsense(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "models.phantom", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = run(str(tmp_path / "out"), "--cases", "1", "--first", "900", "--layout", "msd", "--varied")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/dataset.json").read_text())["numTraining"] == 1
    assert [case.name for case in find_cases(tmp_path / "out")] == ["BRATS_901"]  # this data set counts from 1
    assert run(str(tmp_path / "x"), "--first", "-1").returncode == 2
    assert run(str(tmp_path / "x"), "--cases", "0").returncode == 2
    (tmp_path / "file").touch()
    assert run(str(tmp_path / "file")).returncode == 2
