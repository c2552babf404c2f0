"""The .pt file, splits and the order of cases."""

import hashlib
import json
import shutil
from itertools import chain
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from conftest import run_script, write_raw_case

from models import dataset
from models.dataset import (
    Cases,
    batches,
    choose_cache,
    choose_workers,
    epoch_order,
    input_size,
    manifest_checksum,
    preprocessing_of_cases,
    read_split,
    refuse_leaks,
)
from models.errors import InputError, InputWarning
from models.manifest import make_splits
from models.tensors import load_case

CPU = torch.device("cpu")


def test_a_preprocessed_case_keeps_the_contract(tensors):
    case = torch.load(next(tensors.glob("*.pt")), weights_only=True)
    assert set(case) == {"image", "label", "case", "modalities", "label_scheme", "geometry", "normalization"}
    assert case["image"].dtype == torch.float32 and case["image"].shape == (4, 32, 32, 32)
    assert case["label"].dtype == torch.int64 and case["label"].shape == (1, 32, 32, 32)
    assert set(case["label"].unique().tolist()) == {0, 1, 2, 3}
    assert case["modalities"] == ["t1", "t1ce", "t2", "flair"] and case["label_scheme"] == "brats2021"
    json.dumps([case["geometry"], case["normalization"]])  # plain numbers and lists


def test_compact_files_are_smaller_and_load_as_float32_and_int64(raw, tensors, tmp_path):
    run_script("preprocess_brats.py", raw, "out", "--size", 32, "--compact", "--limit", 1, cwd=tmp_path)
    path = tmp_path / "out/BraTS2021_00000.pt"
    small, full = load_case(path), load_case(tensors / path.name)
    assert small["image"].dtype == torch.float32 and small["label"].dtype == torch.int64
    assert torch.allclose(small["image"], full["image"], atol=1e-3) and torch.equal(small["label"], full["label"])
    assert path.stat().st_size < 0.45 * (tensors / path.name).stat().st_size


def test_data_of_before_the_choice_of_a_normalization_are_the_same_data(raw, tensors, tmp_path):
    """They keep their checksum, and the script finds them done."""
    shutil.copytree(tensors, tmp_path / "old")
    manifest = json.loads((tmp_path / "old/manifest.json").read_text())
    assert manifest["settings"].pop("normalize") == "percentile"
    (tmp_path / "old/manifest.json").write_text(json.dumps(manifest))
    assert manifest_checksum(tmp_path / "old") == manifest_checksum(tensors)
    assert preprocessing_of_cases(tmp_path / "old") == {"size": 32, "spacing_mm": 1.0, "normalize": "percentile"}
    result = run_script("preprocess_brats.py", raw, "old", "--size", 32, cwd=tmp_path)
    assert "12 cases are done already, 0 to do" in result.stdout
    assert json.loads((tmp_path / "old/manifest.json").read_text())["settings"]["normalize"] == "percentile"
    assert manifest_checksum(tmp_path / "old") == manifest_checksum(tensors)


def test_the_checksum_of_data_of_before_the_choice_is_what_it_was(tmp_path):
    settings = {"version": 2, "size": 128, "spacing_mm": 1.0, "compact": False}
    manifest = {"settings": settings, "cases": {"a": {"crc32": "01234567"}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    identity = '[{"compact": false, "size": 128, "spacing_mm": 1.0, "version": 2}, {"a": "01234567"}]'
    assert manifest_checksum(tmp_path) == hashlib.sha256(identity.encode()).hexdigest()


def test_z_scores_are_other_data(raw, tensors, tmp_path):
    shutil.copytree(tensors, tmp_path / "data")
    flags = ["--size", 32, "--normalize", "zscore", "--limit", 3]
    result = run_script("preprocess_brats.py", raw, "data", *flags, cwd=tmp_path)
    assert "other settings (normalize percentile, now zscore)" in result.stdout
    assert preprocessing_of_cases(tmp_path / "data")["normalize"] == "zscore"
    assert load_case(tmp_path / "data/BraTS2021_00000.pt")["image"].min() < 0


# ---- cases of their own sizes, and parts of them -------------------------------------------------------------------


def test_native_cases_keep_the_voxels_of_their_files(native):
    """Between the first and the last that is not zero in any modality, along each axis."""
    for case in sorted((native.parent / "raw").iterdir())[:3]:
        files = [np.asarray(nibabel.load(case / f"{case.name}_{modality}.nii.gz").dataobj)
                 for modality in ("t1", "t1ce", "t2", "flair", "seg")]  # fmt: skip
        files = [volume[::-1, ::-1] for volume in files]  # LPS to RAS
        head = np.argwhere(np.any(files[:4], 0))
        box = tuple(slice(low, high + 1) for low, high in zip(head.min(0), head.max(0), strict=True))
        stored = load_case(native / f"{case.name}.pt")
        for channel, volume in enumerate(files[:4]):
            low, high = np.percentile(volume[volume != 0], (0.5, 99.5))
            expected = np.clip((volume[box] - low) / (high - low), 0, 1) * (volume[box] != 0)
            assert np.allclose(stored["image"][channel], expected, atol=1e-6)
        assert np.array_equal(stored["label"][0], np.where(files[4] == 4, 3, files[4])[box])


def test_native_cases_differ_in_size_and_say_so(native):
    sizes = {tuple(load_case(path)["image"].shape[1:]) for path in native.glob("*.pt")}
    assert len(sizes) > 1
    assert preprocessing_of_cases(native) == {"size": None, "spacing_mm": 1.0, "normalize": "percentile"}
    assert json.loads((native / "manifest.json").read_text())["settings"]["size"] is None


def test_the_input_of_a_network_is_the_case_or_the_patch(tensors, native):
    assert input_size(tensors, read_split(tensors)) == [32, 32, 32]
    assert input_size(tensors, read_split(tensors), patch=16) == [16, 16, 16]
    assert input_size(native, read_split(native), patch=32) == [32, 32, 32]


def test_native_cases_need_a_patch_and_a_patch_a_case_that_is_as_large(tensors, native):
    with pytest.raises(InputError, match=r"native.*--patch"):
        input_size(native, read_split(native))
    with pytest.raises(InputError, match=r"--patch 48: no case in .* more than 32 voxels"):
        input_size(tensors, read_split(tensors), patch=48)


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_a_part_of_a_case_is_what_lies_in_the_box(native, cache):
    name = read_split(native)["train"][0]
    case, cases = load_case(native / f"{name}.pt"), Cases(native, [name], cache, CPU)
    image, label = cases[0, [(3, 19), (0, 16), (10, 26)]]
    assert torch.equal(image, case["image"][:, 3:19, 0:16, 10:26]) and image.is_contiguous()
    assert torch.equal(label.long(), case["label"][:, 3:19, 0:16, 10:26]) and label.dtype == torch.uint8
    assert torch.equal(cases[0][0], case["image"])
    shape, tumour = cases.outlines[0]
    assert shape == case["label"].shape[1:] and (case["label"][0][tuple(tumour.long().T)] > 0).all()


def test_the_memory_of_native_cases_is_that_of_every_one(native, monkeypatch, capsys):
    split = read_split(native)
    names = split["train"] + split["validation"]
    monkeypatch.setattr(dataset, "free_ram_bytes", lambda: 2**40)
    dataset.choose_input(native, names, "ram", 0, 1, 32, CPU)
    needed = sum(17 * load_case(native / f"{name}.pt")["label"].numel() for name in names)  # 4 float32 and a byte
    assert f"11 cases, {needed / 2**30:.1f} GiB of" in capsys.readouterr().out


def test_workers_read_patches_ahead_but_a_whole_case_to_validate(native, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(dataset, "choose_workers", lambda wanted, batch_bytes: seen.append(batch_bytes) or wanted)
    names = read_split(native)["train"]
    largest = max(17 * load_case(native / f"{name}.pt")["label"].numel() for name in names)
    for batch_size in (1, 4):
        dataset.choose_input(native, names, "disk", 2, batch_size, 32, CPU)
    assert seen == [largest, 4 * 17 * 32**3] and largest > 17 * 32**3


# ---- the file ------------------------------------------------------------------------------------------------------


def spoiled(tmp_path, tensors, **changes):
    case = torch.load(tensors / "BraTS2021_00000.pt", weights_only=True) | changes
    torch.save({key: value for key, value in case.items() if value is not None}, tmp_path / "x.pt")
    return tmp_path / "x.pt"


def test_files_of_another_format_are_refused(tmp_path, tensors):
    (tmp_path / "text.pt").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pt")
    bad = {
        tmp_path / "none.pt": "no such file",
        tmp_path / "text.pt": "damaged",
        tmp_path / "list.pt": "not a preprocessed case",
        spoiled(tmp_path, tensors, geometry=None): "no 'geometry'",
    }
    for path, reason in bad.items():
        with pytest.raises(InputError, match=reason):
            load_case(path)
    with pytest.raises(InputError, match="channels"):
        load_case(spoiled(tmp_path, tensors, modalities=["flair", "t1ce", "t1", "t2"]))
    with pytest.raises(InputError, match=r"not \[4, D, H, W\]"):
        load_case(spoiled(tmp_path, tensors, image=torch.zeros(3, 32, 32, 32)))


def test_splits_go_by_patient_and_cover_every_case():
    patients = {f"case{i}-{visit}": f"case{i}" for i in range(50) for visit in range(1 + i % 2)}
    splits = make_splits(patients, seed=0, folds=5)
    parts = [splits["train"], splits["validation"], splits["test"]]
    assert sorted(chain(*parts)) == sorted(patients)
    of = [{patients[case] for case in part} for part in parts]
    assert not (of[0] & of[1] or of[0] & of[2] or of[1] & of[2])
    assert [len(part) for part in of] == [40, 5, 5]


def test_folds_partition_train_and_validation_and_never_touch_the_test_cases():
    patients = {f"c{i}": f"c{i}" for i in range(30)}
    splits = make_splits(patients, seed=3, folds=5)
    validations = [set(fold["validation"]) for fold in splits["folds"]]
    assert set.union(*validations) == set(patients) - set(splits["test"])
    assert sum(map(len, validations)) == 27
    for fold in splits["folds"]:
        assert not set(fold["train"]) & (set(fold["validation"]) | set(splits["test"]))


def test_the_seed_decides_the_split():
    patients = {f"c{i}": f"c{i}" for i in range(30)}
    assert make_splits(patients, 1, 5) == make_splits(dict(reversed(patients.items())), 1, 5)
    assert make_splits(patients, 1, 5)["test"] != make_splits(patients, 2, 5)["test"]


def test_too_few_patients_to_split():
    with pytest.raises(InputError, match="too few"):
        make_splits({"a-1": "a", "a-2": "a", "b-1": "b"}, 0, 5)
    assert [len(make_splits(dict(zip("abc", "abc", strict=True)), 0, 5)[k]) for k in ("train", "test")] == [1, 1]


def test_without_test_cases_every_patient_is_in_a_fold():
    patients = {f"c{i}": f"c{i}" for i in range(12)}
    splits = make_splits(patients, 0, folds=4, test_share=0)
    assert [len(splits[part]) for part in ("train", "validation", "test")] == [11, 1, 0]
    assert sorted(chain(*(fold["validation"] for fold in splits["folds"]))) == sorted(patients)
    assert all(len(fold["train"]) == 9 for fold in splits["folds"])


@pytest.mark.parametrize(("share", "tested"), [(0.01, 1), (0.25, 10), (0.5, 20)])
def test_a_share_of_the_patients_is_tested_and_a_tenth_validated(share, tested):
    splits = make_splits({f"c{i}": f"c{i}" for i in range(40)}, 0, 5, share)
    assert [len(splits[part]) for part in ("train", "validation", "test")] == [36 - tested, 4, tested]


def test_two_patients_are_enough_where_none_is_tested():
    splits = make_splits({"a": "a", "b": "b"}, 0, 5, test_share=0)
    assert [len(splits[part]) for part in ("train", "validation", "test")] == [1, 1, 0]
    with pytest.raises(InputError, match="nobody to train on"):
        make_splits({f"c{i}": f"c{i}" for i in range(4)}, 0, 5, test_share=0.8)


def test_a_fold_that_does_not_exist_is_refused(tensors):
    assert read_split(tensors, 0)["test"] == read_split(tensors)["test"]
    with pytest.raises(InputError, match="folds 0 to 4"):
        read_split(tensors, 9)


@pytest.fixture
def manifest_of(tmp_path):
    """Writes a manifest with these cases and fingerprints; returns its folder."""

    def write(**marks):
        cases = {name.replace("_", "-"): {"patient": name, "fingerprint": mark} for name, mark in marks.items()}
        settings = {"size": 32, "spacing_mm": 1.0}
        (tmp_path / "manifest.json").write_text(json.dumps({"settings": settings, "cases": cases}))
        return tmp_path

    return write


@pytest.mark.parametrize(("part", "other"), [("train", "BraTS2021_00007"), ("validation", "BraTS-GLI-00007-001")])
def test_a_patient_of_the_test_is_not_trained_on_under_any_name(manifest_of, part, other):
    split = {"train": ["A"], "validation": ["B"], "test": ["C", "BraTS-GLI-00007-000"]}
    data = manifest_of(A="1", B="2", C="3")
    refuse_leaks(data, split)
    split[part].append(other)
    with pytest.raises(InputError, match=rf"splits\.json: 1 patient .*BraTS-GLI-00007-000 and {other}\. .* new split"):
        refuse_leaks(data, split)


def test_the_same_scans_are_not_trained_and_tested_on(manifest_of):
    with pytest.raises(InputError, match="such as that of C and A"):
        refuse_leaks(manifest_of(A="1", B="2", C="1"), {"train": ["A"], "validation": ["B"], "test": ["C"]})


def test_a_patient_in_training_and_validation_is_told(manifest_of):
    with pytest.warns(InputWarning, match="such as that of A and A: the best epoch"):
        refuse_leaks(manifest_of(A="1", B="2"), {"train": ["A"], "validation": ["A"], "test": ["B"]})


def test_two_visits_of_a_patient_stay_together_through_the_script(tmp_path):
    for patient in range(4):
        for visit in range(2):
            name = f"BraTS-GLI-{patient:05d}-{visit:03d}"
            write_raw_case(tmp_path / "raw", name, "brats2023", seed=patient, shape=(24, 24, 24))
    run_script("preprocess_brats.py", "raw", "out", "--size", 16, cwd=tmp_path)
    splits = read_split(tmp_path / "out")
    assert all(len(part) % 2 == 0 for part in splits.values())


def test_all_trains_on_everything_that_is_not_for_testing(tensors):
    split = read_split(tensors)
    everything = read_split(tensors, "all")
    assert everything["test"] == split["test"]
    assert set(everything["train"]) == set(everything["validation"]) == {*split["train"], *split["validation"]}


def test_every_process_trains_on_its_share_and_as_often_as_the_others():
    shares = [epoch_order(10, seed=0, epoch=3, rank=rank, world_size=4) for rank in range(4)]
    assert {len(share) for share in shares} == {3}
    assert set(chain(*shares)) == set(range(10))
    assert epoch_order(10, 0, 3) != epoch_order(10, 0, 4)


def test_every_process_has_a_case_though_there_are_more_than_twice_as_many_processes():
    shares = [epoch_order(3, seed=0, epoch=0, rank=rank, world_size=8) for rank in range(8)]
    assert {len(share) for share in shares} == {1} and set(chain(*shares)) == {0, 1, 2}


@pytest.mark.parametrize(("cache", "workers"), [("device", 0), ("ram", 0), ("disk", 0), ("disk", 2)])
def test_batches_hold_the_cases_as_stored_in_the_given_order(tensors, cache, workers):
    names = read_split(tensors)["train"][:3]
    cases = Cases(tensors, names, cache, CPU)
    got = list(batches(cases, [2, 0, 1], 2, CPU, workers))
    assert [len(images) for images, _, _ in got] == [2, 1]
    expected = torch.load(tensors / f"{names[2]}.pt", weights_only=True)
    image, label = got[0][0][0], got[0][1][0]
    assert image.dtype == torch.float32 and torch.equal(image, expected["image"])
    assert label.dtype == torch.uint8 and torch.equal(label.long(), expected["label"])


def test_compact_cases_are_kept_in_half_the_memory(raw, tmp_path):
    run_script("preprocess_brats.py", raw, "out", "--size", 32, "--compact", "--limit", 1, cwd=tmp_path)
    image, label = Cases(tmp_path / "out", ["BraTS2021_00000"], "ram", CPU)[0]
    assert image.dtype == torch.float16 and label.dtype == torch.uint8


# ---- where the cases are kept: 10 cases of 1 GiB ----


@pytest.fixture
def machine(monkeypatch):
    """Sets what is free in GiB, and how many processes share it."""

    def set_machine(ram, gpu=None, processes=1):
        monkeypatch.setattr(dataset, "free_ram_bytes", lambda: ram * 2**30)
        monkeypatch.setattr(dataset, "free_memory_bytes", lambda device: gpu * 2**30)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        return torch.device("cpu" if gpu is None else "cuda")

    return set_machine


@pytest.mark.parametrize(
    ("free", "chosen"),
    [
        ({"ram": 21}, "ram"),
        ({"ram": 19}, "disk"),
        ({"ram": 39, "processes": 2}, "disk"),
        ({"ram": 5, "gpu": 21}, "device"),
        ({"ram": 21, "gpu": 19}, "ram"),
        ({"ram": 19, "gpu": 21, "processes": 8}, "device"),
        ({"ram": 19, "gpu": 19}, "disk"),
        ({"ram": float("nan")}, "disk"),
    ],
)
def test_auto_takes_the_fastest_memory_that_has_twice_the_space(machine, capsys, free, chosen):
    assert choose_cache("auto", [2**30] * 10, True, machine(**free)) == chosen
    assert capsys.readouterr().out.startswith(f"cache: {chosen} (10 cases, ")


def test_the_choice_is_told_in_one_line_with_its_figures(machine, capsys):
    choose_cache("auto", [2**30] * 10, True, machine(ram=50, processes=2))
    assert capsys.readouterr().out == "cache: ram (10 cases, 20.0 GiB of 50.0 GiB free)\n"


def test_a_cache_asked_for_is_taken_where_it_fits_and_refused_with_one_that_does(machine):
    assert choose_cache("ram", [2**30] * 10, True, machine(ram=11)) == "ram"
    assert choose_cache("device", [2**30] * 10, True, machine(ram=11)) == "ram"  # on a CPU
    with pytest.raises(InputError, match=r"10 cases take 10\.0 GiB and 9\.0 GiB are free\. Use --cache disk"):
        choose_cache("ram", [2**30] * 10, True, machine(ram=9))
    with pytest.raises(InputError, match="Use --cache ram"):
        choose_cache("device", [2**30] * 10, True, machine(ram=21, gpu=9))
    with pytest.raises(InputError, match="Use --cache device"):
        choose_cache("ram", [2**30] * 10, True, machine(ram=9, gpu=21))


def test_pinned_memory_is_counted_in_the_powers_of_two_that_it_comes_in(machine):
    assert choose_cache("ram", [2**30 + 1] * 10, True, machine(ram=21, gpu=1)) == "ram"
    with pytest.raises(InputError, match=r"20\.0 GiB"):
        choose_cache("ram", [2**30 + 1] * 10, True, machine(ram=19, gpu=1))


def test_cases_of_several_sizes_are_added_up(machine, capsys):
    case_bytes = [2**30 + 1, 2**29, 2**29]  # in pinned memory 2 GiB and twice a half
    assert choose_cache("ram", case_bytes, False, machine(ram=2.5)) == "ram"
    assert choose_cache("ram", case_bytes, True, machine(ram=3.5, gpu=1)) == "ram"
    choose_cache("ram", case_bytes, False, machine(ram=2.5, gpu=1))
    said = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[1].split(" GiB")[0] for line in said] == ["2.0", "3.0", "2.0"]


@pytest.mark.parametrize(("free_mib", "workers"), [(900, 4), (899, 3), (64, 0), (0, 0)])
def test_no_more_workers_than_the_shared_memory_has_space_for(monkeypatch, tmp_path, capsys, free_mib, workers):
    """Each of the four reads two batches of 100 MiB ahead, and one is in use."""
    monkeypatch.setattr(dataset, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(dataset.shutil, "disk_usage", lambda path: SimpleNamespace(free=free_mib * 2**20))
    assert choose_workers(4, 100 * 2**20) == workers
    assert capsys.readouterr().out.count("\n") == (workers < 4)


def test_a_script_refuses_a_cache_that_does_not_fit_before_it_makes_a_run(tensors, tmp_path, monkeypatch):
    split = read_split(tensors)
    monkeypatch.setattr(dataset, "free_ram_bytes", lambda: 1000)
    with pytest.raises(InputError, match="--cache ram: 11 cases"):
        dataset.choose_input(tensors, split["train"] + split["validation"], "ram", 0, 1, None, CPU)
