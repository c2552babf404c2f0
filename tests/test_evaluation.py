"""What is scored on which cases, and from predictions to scores. tests/test_evaluate.py runs evaluate.py itself."""

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from conftest import LPS, write_raw_case
from torch.nn.functional import interpolate, one_hot

from models.brats import TARGETS
from models.cases import find_cases
from models.errors import InputError, InputWarning
from models.evaluation.cases import find_predictions, item_on_its_grid, raw_item, read_ahead, read_prediction
from models.evaluation.outputs import counted
from models.evaluation.plan import Entry, Part, fold_groups, name_of_folds, names_of_groups, plan_raw, refuse_trained_on
from models.evaluation.scoring import Job, pack, score, scored, unpack
from models.nifti import to_ras
from models.runs import Run, patients_seen

SPLIT = {"train": ["a", "BraTS-GLI-00001-000"], "validation": ["c"], "test": ["d"]}
PREPROCESSING = {"size": 32, "spacing_mm": 1.0, "normalize": "percentile"}


def run(name: str, fold: int | None = None, network="unet", data_sha256="1", split=SPLIT, **settings) -> Run:
    where = {"name": name, "folder": Path(name), "checkpoint": Path(name, "best.pt"), "data": Path("data")}
    trained = {"network": network, "config": {}, "epoch": 1, "amp": "off", "size": [32] * 3, "inference": {}}
    data = {"preprocessing": PREPROCESSING, "data_sha256": data_sha256, "split": split, "fold": fold,
            "seen": patients_seen({"split": split})}  # fmt: skip
    return Run(**where, **trained, **data, settings=settings)


# ---- the plan ------------------------------------------------------------------------------------------------------


def test_folds_of_each_network_are_one_group():
    runs = [run("u0", 0), run("s0", 0, "swinunetr"), run("u1", 1), run("s1", 1, "swinunetr")]
    assert [[member.name for member in group] for group in fold_groups(runs)] == [["u0", "u1"], ["s0", "s1"]]


def test_folds_of_each_way_of_training_are_one_group():
    runs = [run(f"{name}{fold}", fold, **flags) for name, flags in (("a", {"epochs": 1}), ("b", {"epochs": 2}))
            for fold in (0, 1)]  # fmt: skip
    assert [[member.name for member in group] for group in fold_groups(runs)] == [["a0", "a1"], ["b0", "b1"]]


def test_groups_of_folds_with_one_name_are_told_apart_by_their_network():
    unet, swin, other = ([run(f"{name}-fold{fold}", fold, network) for fold in (0, 1)]
                         for name, network in (("cv", "unet"), ("cv", "swinunetr"), ("other", "unet")))  # fmt: skip
    assert names_of_groups([unet, swin, other]) == ["unet-cv", "swinunetr-cv", "other"]
    with pytest.raises(InputError, match="both called unet-cv"):
        names_of_groups([unet, unet])


def test_runs_without_folds_are_no_cross_validation():
    assert fold_groups([run("a"), run("b", 1)]) is None
    assert fold_groups([run("u0", 0), run("s0", 0, "swinunetr")]) is None


def test_a_fold_given_twice_and_folds_of_other_data_are_refused():
    with pytest.raises(InputError, match="both fold 1"):
        fold_groups([run("a", 1), run("b", 1)])
    with pytest.raises(InputError, match="different data"):
        fold_groups([run("a", 0), run("b", 1, data_sha256="2")])


@pytest.mark.parametrize(
    ("names", "common"),
    [
        (("real-96-fold0", "real-96-fold1"), "real-96"),
        (("fold_0", "fold_1"), "unet"),
        (("cv.0", "cv.1"), "cv"),
        (("x", "y"), "unet"),
    ],
)
def test_folds_are_called_after_what_their_names_share(names, common):
    assert name_of_folds([run(name, fold) for fold, name in enumerate(names)]) == common


def test_another_visit_of_a_patient_in_training_is_refused():
    entry = Entry("r", "raw cases", (Part((run("r"),), ("x", "BraTS-GLI-00001-003"), None),))
    with pytest.raises(InputError, match=r"trained on 1 of the cases.*BraTS-GLI-00001-003"):
        refuse_trained_on([entry])
    refuse_trained_on([Entry("r", "raw cases", (Part((run("r"),), ("x", "BraTS-GLI-00002-000"), None),))])


def test_an_ensemble_needs_two_runs():
    with pytest.raises(InputError, match="two runs or more"):
        plan_raw([run("a")], ["x"], ensemble=True)
    entries = plan_raw([run("a"), run("b")], ["x"], ensemble=True)
    assert [(entry.name, len(entry.parts[0].runs)) for entry in entries] == [("a", 1), ("b", 1), ("ensemble", 2)]


# ---- the cases -----------------------------------------------------------------------------------------------------


def test_cases_are_read_one_ahead_in_order():
    begun = []

    def read(name):
        begun.append(name)
        return name.upper()

    reader = read_ahead(["a", "b", "c", "d"], read)
    assert next(reader) == "A" and set(begun) <= {"a", "b"}
    assert list(reader) == ["B", "C", "D"] and begun == ["a", "b", "c", "d"]
    assert list(read_ahead([], read)) == []


def test_an_unreadable_case_is_named_and_the_others_go_on():
    def read(name):
        if name == "b":
            raise InputError("b is damaged.")
        return name

    failures = {}
    assert list(read_ahead(["a", "b", "c"], read, failures)) == ["a", "c"] and failures == {"b": "b is damaged."}
    with pytest.raises(InputError, match="b is damaged"):
        list(read_ahead(["a", "b", "c"], read))


def test_labelled_voxels_outside_the_head_are_told_with_the_case(tmp_path):
    folder, _, label = write_raw_case(tmp_path, "C")
    label[0, 0, :5] = 2
    nibabel.save(nibabel.Nifti1Image(label, LPS), folder / "C_seg.nii.gz")
    with pytest.warns(InputWarning, match=rf"C: segmentation, 5 of {np.count_nonzero(label)} labelled voxels"):
        raw_item(find_cases(tmp_path, "brats2023")[0], PREPROCESSING)


def test_missing_and_extra_label_maps_are_named(tmp_path):
    for name in ("a.nii.gz", "b.nii", ".hidden.nii.gz"):
        (tmp_path / name).touch()
    assert find_predictions(tmp_path, ["a", "b"]) == {"a": tmp_path / "a.nii.gz", "b": tmp_path / "b.nii"}
    with pytest.raises(InputError, match="no label map of c, d, e and 1 more"):
        find_predictions(tmp_path, ["a", "b", "c", "d", "e", "f"])
    with pytest.raises(InputError, match="unknown cases: b"):
        find_predictions(tmp_path, ["a"])
    with pytest.raises(InputError, match="no label map of c, but one of b"):
        find_predictions(tmp_path, ["a", "c"])


def test_of_two_label_maps_of_a_case_none_is_chosen_and_a_backup_is_none(tmp_path):
    for name in ("a.nii.gz", "a.nii.gz.bak", "._a.nii"):
        (tmp_path / name).touch()
    assert find_predictions(tmp_path, ["a"]) == {"a": tmp_path / "a.nii.gz"}
    (tmp_path / "a.nii").touch()
    with pytest.raises(InputError, match=r"two label maps of a: a\.nii and a\.nii\.gz"):
        find_predictions(tmp_path, ["a"])


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom")
    write_raw_case(folder)
    return find_cases(folder)[0]


def write(path, label, affine):
    nibabel.save(nibabel.Nifti1Image(label, affine), path)
    return path


def test_a_label_map_on_another_grid_or_of_probabilities_is_refused(phantom, tmp_path):
    item = item_on_its_grid(phantom)
    affine, label = np.array(item.geometry["affine"]), item.truth
    raw = np.where(label == 3, 4, label).astype(np.uint8)
    read = read_prediction(write(tmp_path / "good.nii.gz", raw, affine), item, "brats2021")
    assert np.array_equal(read, label)
    for name, voxels, its_affine, reason in (
        ("shape", raw[1:], affine, "shape"),
        ("affine", raw, affine + np.eye(4)[:, [1, 2, 3, 0]] * [0, 0, 0, 1], "affine .* differs"),
        ("probability", raw * np.float32(0.3), affine, "whole numbers"),
        ("labels", raw + np.uint8(1), affine, "label value 3"),
    ):
        with pytest.raises(InputError, match=reason):
            read_prediction(write(tmp_path / f"{name}.nii.gz", voxels, its_affine), item, "brats2021")


@pytest.mark.parametrize(("cases", "words"), [(1, "1 test case"), (11, "11 test cases"), (21, "21 test cases")])
def test_the_cases_are_counted_in_words(cases, words):
    assert counted(cases, "test cases") == words


# ---- the scores ----------------------------------------------------------------------------------------------------


def job_of(item, prediction) -> Job:
    return Job(item.name, "native", prediction, item.truth, [1.0, 1.0, 1.0], b"", item.label.numpy(), run="r",
               geometry=item.geometry, network_truth=item.label.numpy())  # fmt: skip


def test_a_case_is_scored_with_the_ceiling_of_its_resize_beside(phantom):
    item = raw_item(phantom, PREPROCESSING)
    rows = {row["target"]: row for row in score(job_of(item, item.truth)).rows}
    assert all(row["dice"] == 1 for row in rows.values())
    # torch resizes the labels, one channel each, to the crop that they came from.
    channels = one_hot(item.label.long(), 4).movedim(-1, 0)[None].float()  # [1, 4, D, H, W]
    crop = item.geometry["crop_box"]
    size = [high - low for low, high in crop]
    back = torch.zeros(item.geometry["resampled_shape"], dtype=torch.uint8)
    back[tuple(slice(*side) for side in crop)] = interpolate(channels, size, mode="trilinear")[0].argmax(0)
    truth = to_ras(item.truth[None], np.array(item.geometry["affine"]))[0]
    for target, labels in TARGETS.items():
        there, true = np.isin(back, labels), np.isin(truth, labels)
        dice = 2 * (there & true).sum() / (there.sum() + true.sum())
        assert rows[target]["ceiling_dice"] == pytest.approx(dice, abs=2e-3)


def test_label_maps_come_back_as_they_were_packed():
    label = np.random.default_rng(0).integers(0, 4, (5, 7, 9)).astype(np.uint8)
    assert np.array_equal(unpack(pack(label)), label)
    assert np.array_equal(unpack(pack(label.transpose(2, 0, 1))), label.transpose(2, 0, 1))


def test_processes_give_what_one_gives_in_the_same_order(phantom):
    item = raw_item(phantom, PREPROCESSING)
    jobs = [job_of(item, np.roll(item.truth, shift, 0)) for shift in range(5)]
    jobs = [replace(job, case=str(place)) for place, job in enumerate(jobs)]
    alone, together = list(scored(iter(jobs), 1)), list(scored(iter(jobs), 2))
    assert [one.case for one in together] == ["0", "1", "2", "3", "4"]
    assert [one.rows for one in together] == [one.rows for one in alone]
