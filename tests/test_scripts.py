"""The scripts as a user runs them: what they write, what they refuse, and with which exit status."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
from conftest import ROOT, RUN, needs_signals, read, run_script, write_raw_case
from PIL import Image

import preprocess_brats
from models.errors import InputError
from models.runs import open_run

SCRIPTS = ["view_interactive_4pane_brats.py", "preprocess_brats.py", "train_unet.py", "train_swinunetr.py",
           "evaluate.py", "benchmark_inference.py"]  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_heavy_and_shows_examples(script):
    code = (f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); sys.argv = [{script!r}, '--help']\n"
            f"try: runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
            "except SystemExit as status: assert not status.code\n"
            "assert not {'torch', 'numpy', 'monai', 'nibabel', 'matplotlib'} & set(sys.modules)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(script) >= 3


def test_a_unet_of_other_settings_is_trained_from_the_command_line_and_started_from(tensors, tmp_path):
    network = ["--variant", "space-to-depth", "--channels", 4, 8, 12, "--convolutions", 1, 1, 2, "--residual",
               "--upsampling", "trilinear"]  # fmt: skip
    recipe = ["--augmentation", "strong", "--copy-paste", 0.5, "--ema", 0.9, "--epochs", 1, "--amp", "off"]
    run_script("train_unet.py", tensors, *network, *recipe, "--run-name", "first", cwd=tmp_path)
    run_script("train_unet.py", tensors, *recipe, "--run-name", "second", "--init", RUN, cwd=tmp_path)
    config = open_run(tmp_path / "models/unet/results/second").config
    assert (config["variant"], config["channels"], config["residual"]) == ("space-to-depth", [4, 8, 12], True)
    other = ["--init", RUN, "--channels", 4, 8, 8]
    refused = run_script("train_unet.py", tensors, *other, "--run-name", "third", cwd=tmp_path, status=2)
    assert f"{RUN}/best.pt: not what these flags ask for: channels [4, 8, 12] (the flags: [4, 8, 8])." in refused.stderr
    assert refused.stderr.count("\n") == 1
    refused = run_script("train_unet.py", tensors, "--convolutions", 3, 3, 3, 3, 3, cwd=tmp_path, status=2)
    assert "the variant 'monai' of the U-Net has no such setting" in refused.stderr


def test_preprocessing_skips_what_is_done_and_resumes_what_is_not(raw, tensors):
    stamps = {path.name: path.stat().st_mtime_ns for path in tensors.glob("*.pt")}
    lost = tensors / "BraTS2021_00004.pt"
    content = lost.read_bytes()
    lost.unlink()
    result = run_script("preprocess_brats.py", raw, tensors, "--size", 32, cwd=tensors.parent)
    assert "11 cases are done already, 1 to do" in result.stdout
    assert lost.read_bytes() == content
    again = {path.name: path.stat().st_mtime_ns for path in tensors.glob("*.pt")}
    assert {name for name in stamps if stamps[name] != again[name]} == {lost.name}


def test_preprocessing_says_what_it_found_and_records_what_it_did(raw, tensors):
    result = run_script("preprocess_brats.py", raw, tensors, "--size", 32, cwd=tensors.parent)
    assert "12 cases, BraTS 2017-2021 names" in result.stdout and "4 = ET" in result.stdout
    manifest = json.loads((tensors / "manifest.json").read_text())
    assert manifest["settings"]["size"] == 32 and len(manifest["cases"]) == 12
    entry = manifest["cases"]["BraTS2021_00000"]
    assert len(entry["sources"]) == 5
    assert int(entry["crc32"], 16) == zlib.crc32((tensors / "BraTS2021_00000.pt").read_bytes())
    assert not list(tensors.glob(".*"))  # no temporary files


@pytest.fixture(scope="module")
def many_raw(raw, tmp_path_factory):
    """Sixty cases that are links to one: enough that a run can be stopped in its middle."""
    folder = tmp_path_factory.mktemp("many")
    for index in range(60):
        (folder / f"C{index:02d}").mkdir()
        for file in (raw / "BraTS2021_00000").iterdir():
            (folder / f"C{index:02d}" / file.name.replace("BraTS2021_00000", f"C{index:02d}")).symlink_to(file)
    return folder


def start_preprocessing(*arguments, cwd):
    """The script with one worker, as a process group of its own."""
    command = [sys.executable, str(ROOT / "preprocess_brats.py"), *map(str, arguments), "--workers", "1"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=cwd, start_new_session=True, **quiet)


def wait_until(process, condition):
    while process.poll() is None and not condition():
        time.sleep(0.02)
    assert process.poll() is None, "it ended too soon to test anything"


@needs_signals
def test_a_killed_preprocessing_goes_on_where_it_stopped(many_raw, tmp_path):
    process = start_preprocessing(many_raw, "out", "--size", 96, cwd=tmp_path)
    wait_until(process, (tmp_path / "out/manifest.json").exists)
    process.kill()
    process.wait()
    kept = set(json.loads((tmp_path / "out/manifest.json").read_text())["cases"])
    assert 0 < len(kept) < 60, "killed too late to test anything"
    result = run_script("preprocess_brats.py", many_raw, "out", "--size", 96, "--workers", 2, cwd=tmp_path)
    assert f"{len(kept)} cases are done already, {60 - len(kept)} to do" in result.stdout
    assert len(list((tmp_path / "out").glob("*.pt"))) == 60


@needs_signals
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_end_every_process_and_keep_what_is_done(many_raw, tmp_path, number, status):
    process = start_preprocessing(many_raw, "out", "--size", 96, cwd=tmp_path)
    wait_until(process, lambda: len(list(tmp_path.glob("out/*.pt"))) > 2)
    os.killpg(process.pid, number)  # as a terminal does it: to the workers as well
    for wait_s in (0.001, 0.05):
        time.sleep(wait_s)
        os.killpg(process.pid, number)
    assert process.wait(timeout=30) == status
    with pytest.raises(ProcessLookupError):
        for _ in range(300):  # what has ended stays in the group until the system collects it
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    kept = json.loads((tmp_path / "out/manifest.json").read_text())["cases"]
    assert 2 <= len(kept) < 60
    assert not list((tmp_path / "out").glob(".*.tmp"))


@needs_signals
def test_other_settings_forget_the_old_split_before_the_first_new_tensor(many_raw, tmp_path):
    run_script("preprocess_brats.py", many_raw, "out", "--size", 16, "--limit", 12, cwd=tmp_path)
    old = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("out/*.pt")}
    process = start_preprocessing(many_raw, "out", "--size", 96, cwd=tmp_path)
    first = tmp_path / "out/C00.pt"
    wait_until(process, lambda: first.stat().st_mtime_ns != old[first.name])
    process.kill()
    process.wait()
    assert not (tmp_path / "out/splits.json").exists()
    assert "preprocess_brats.py" in run_script("train_unet.py", "out", cwd=tmp_path, status=2).stderr


@pytest.fixture(scope="module")
def unsharded(raw, tmp_path_factory):
    """The twelve cases, one of them damaged, in 16^3 by one process: the raw folder and the result."""
    folder = tmp_path_factory.mktemp("unsharded")
    damaged = shutil.copytree(raw, tmp_path_factory.mktemp("damaged") / "raw")
    (damaged / "BraTS2021_00003/BraTS2021_00003_t2.nii.gz").unlink()
    run_script("preprocess_brats.py", damaged, "out", "--size", 16, cwd=folder, status=3)
    return damaged, folder / "out"


@pytest.mark.parametrize("count", [2, 3])
def test_shards_write_what_one_process_writes(unsharded, tmp_path, count):
    raw, expected = unsharded
    for index in range(count):
        last = index == count - 1
        result = run_script("preprocess_brats.py", raw, "out", "--size", 16, "--shard", f"{index}/{count}",
                            cwd=tmp_path, status=3 if last else 0)  # fmt: skip
        assert ("Not yet done" in result.stdout) != last
        assert (tmp_path / "out/splits.json").exists() == last
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in expected.iterdir()}
    for path in expected.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    again = run_script("preprocess_brats.py", raw, "out", "--size", 16, cwd=tmp_path, status=3)
    assert "11 cases are done already, 1 to do" in again.stdout


def test_shards_at_the_same_time_named_by_the_environment_of_torchrun(unsharded, tmp_path):
    raw, expected = unsharded
    command = [sys.executable, str(ROOT / "preprocess_brats.py"), str(raw), "out", "--size", "16", "--workers", "1"]
    ranks = [
        subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"})
        for rank in range(2)
    ]
    assert {rank.wait(timeout=300) for rank in ranks} <= {0, 3}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in expected.iterdir()}
    for name in ("manifest.json", "splits.json", "failures.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (expected / name).read_bytes()


def test_a_run_without_shards_takes_over_what_they_have_done(unsharded, tmp_path):
    raw, expected = unsharded
    run_script("preprocess_brats.py", raw, "out", "--size", 16, "--shard", "1/2", cwd=tmp_path)
    result = run_script("preprocess_brats.py", raw, "out", "--size", 16, cwd=tmp_path, status=3)
    assert "5 cases are done already, 7 to do" in result.stdout
    assert (tmp_path / "out/manifest.json").read_bytes() == (expected / "manifest.json").read_bytes()
    assert not list(tmp_path.glob("out/manifest-shard-*"))


def test_a_shard_with_other_flags_is_refused_and_changes_nothing(unsharded, tmp_path):
    raw, _ = unsharded
    run_script("preprocess_brats.py", raw, "out", "--size", 16, "--shard", "0/2", cwd=tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for flags in (["--size", 24], ["--size", 16, "--seed", 1], ["--size", 16, "--limit", 7]):
        result = run_script("preprocess_brats.py", raw, "out", *flags, "--shard", "1/2", cwd=tmp_path, status=2)
        assert len(result.stderr.strip().splitlines()) == 1 and "manifest-shard-0-of-2.json" in result.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("shard", ["2/2", "1", "a/b", "-1/2", "0/0"])
def test_a_shard_that_cannot_be_is_refused(raw, tmp_path, shard):
    result = run_script("preprocess_brats.py", raw, "out", f"--shard={shard}", cwd=tmp_path, status=2)
    assert len(result.stderr.strip().splitlines()) == 1 and "--shard" in result.stderr
    assert not (tmp_path / "out").exists()


def test_other_settings_make_every_case_again(raw, tmp_path):
    run_script("preprocess_brats.py", raw, "out", "--size", 16, "--limit", 2, cwd=tmp_path)
    result = run_script("preprocess_brats.py", raw, "out", "--size", 32, "--limit", 2, cwd=tmp_path)
    assert "other settings (size 16, now 32)" in result.stdout
    assert "0 cases are done already, 2 to do" in result.stdout


def test_bad_cases_are_named_in_failures_csv_and_the_others_go_on(tmp_path):
    for index in range(5):
        write_raw_case(tmp_path / "raw", f"C{index}", seed=index)
    (tmp_path / "raw/C1/C1_t2.nii.gz").unlink()
    broken = tmp_path / "raw/C3/C3_flair.nii.gz"
    broken.write_bytes(broken.read_bytes()[:2000])
    seg = tmp_path / "raw/C4/C4_seg.nii.gz"
    image = nibabel.load(seg)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj) * 0 + 7, image.affine), seg)
    result = run_script("preprocess_brats.py", "raw", "out", "--size", 16, cwd=tmp_path, status=3)
    reasons = {row["case"]: row["reason"] for row in read(tmp_path / "out/failures.csv")}
    assert set(reasons) == {"C1", "C3", "C4"}
    assert "no t2 file" in reasons["C1"] and "truncated" in reasons["C3"] and "value 7" in reasons["C4"]
    assert {path.stem for path in (tmp_path / "out").glob("*.pt")} == {"C0", "C2"}
    assert "too few cases to split" in result.stdout and not (tmp_path / "out/splits.json").exists()
    trained = run_script("train_unet.py", "out", cwd=tmp_path, status=2)
    assert "too few cases to split" in trained.stderr


def test_an_unlabelled_case_is_preprocessed_but_not_trained_on(tmp_path):
    for index in range(4):
        folder, _, _ = write_raw_case(tmp_path / "raw", f"C{index}", seed=index)
    (folder / "C3_seg.nii.gz").unlink()
    result = run_script("preprocess_brats.py", "raw", "out", "--size", 16, cwd=tmp_path)
    assert "1 without segmentation" in result.stdout
    splits = json.loads((tmp_path / "out/splits.json").read_text())
    assert "C3" not in splits["train"] + splits["validation"] + splits["test"]
    assert (tmp_path / "out/C3.pt").exists()


def test_training_writes_the_whole_run(trained):
    files = {path.name for path in (trained / RUN).iterdir()}
    assert files == {"config.json", "train.csv", "training_plots.png", "best.pt", "last.pt", "test_results.csv",
                     "test_prediction_overlay.png"}  # fmt: skip
    rows = read(trained / RUN / "test_results.csv")
    assert [row["case"] for row in rows][-1] == "mean" and {"loss", "dice_WT", "dice_ET", "dice_NCR"} <= set(rows[0])
    for picture in ("training_plots.png", "test_prediction_overlay.png"):
        assert np.asarray(Image.open(trained / RUN / picture).convert("L")).std() > 5
    opened = open_run(trained / RUN)
    assert opened.size == [32, 32, 32]
    assert opened.preprocessing == {"size": 32, "spacing_mm": 1.0, "normalize": "percentile"}


def test_without_test_cases_a_training_says_so_and_skips_the_test(raw, tmp_path):
    flags = ["--size", 32, "--limit", 8, "--test-share", 0, "--folds", 4]
    made = run_script("preprocess_brats.py", raw, "data", *flags, cwd=tmp_path)
    assert "7 train, 1 validation, 0 test cases, 4 folds" in made.stdout
    result = run_script("train_unet.py", "data", "--epochs", 1, "--fold", 3, "--run-name", "fold3", cwd=tmp_path)
    assert "no test cases" in result.stdout and "Test Dice" not in result.stdout
    run = tmp_path / "models/unet/results/fold3"
    assert {path.name for path in run.iterdir()} == {"config.json", "train.csv", "training_plots.png", "best.pt",
                                                     "last.pt"}  # fmt: skip
    assert open_run(run).split["test"] == []


@pytest.mark.parametrize("script", ["train_unet.py", pytest.param("train_swinunetr.py", marks=pytest.mark.slow)])
def test_regions_on_patches_of_native_z_scores(native, tmp_path, script):
    """All of the other track at once, from the raw cases on."""
    flags = ["--size", "native", "--normalize", "zscore", "--compact"]
    run_script("preprocess_brats.py", native.parent / "raw", "data", *flags, cwd=tmp_path)
    flags = ["--patch", 32, "--regions", "--epochs", 1, "--run-name", "other"]
    small = ["--feature-size", 12, "--window-size", 4] if "swin" in script else []
    result = run_script(script, "data", *flags, *small, cwd=tmp_path)
    assert "per volume of 32 x 32 x 32 voxels" in result.stdout and "Test Dice: WT" in result.stdout
    (run,) = tmp_path.glob("models/*/results/other")
    opened = open_run(run)
    assert opened.preprocessing == {"size": None, "spacing_mm": 1.0, "normalize": "zscore"}
    assert opened.size == [32, 32, 32] and opened.config["out_channels"] == 3
    assert (run / "test_prediction_overlay.png").is_file()


@pytest.mark.parametrize(
    ("size", "spacing", "compact", "gigabytes"),
    [(128, 1.0, False, 5.0), (128, 1.0, True, 1.9), (None, 1.0, False, 8.2), (None, 2.0, True, 0.4)],
)
def test_a_disk_that_is_too_small_for_a_hundred_cases_is_refused_first(monkeypatch, size, spacing, compact, gigabytes):
    """24 bytes a voxel, or 9; what a native case takes is estimated."""
    args = SimpleNamespace(size=size, spacing=spacing, compact=compact, out="OUT")
    free = gigabytes * 1e9 + 0.06e9
    monkeypatch.setattr(preprocess_brats.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    preprocess_brats.refuse_full_disk(args, 100)
    free -= 0.12e9
    with pytest.raises(InputError, match=f"100 cases need {gigabytes} GB"):
        preprocess_brats.refuse_full_disk(args, 100)


def test_native_cases_are_made_again_where_cubes_were(raw, tmp_path):
    run_script("preprocess_brats.py", raw, "out", "--size", 16, "--limit", 3, cwd=tmp_path)
    result = run_script("preprocess_brats.py", raw, "out", "--size", "native", "--limit", 3, cwd=tmp_path)
    assert "other settings (size 16, now native)" in result.stdout


@pytest.mark.slow
def test_bad_input_gets_one_line_and_status_2(trained, raw, tensors, native, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    config = json.loads((trained / RUN / "config.json").read_text())
    other = trained / "models/unet/results/other"
    other.mkdir(exist_ok=True)
    (other / "best.pt").write_bytes((trained / RUN / "best.pt").read_bytes())
    config["split"]["test"] = config["split"]["train"][:1]
    (other / "config.json").write_text(json.dumps(config))
    bad = [
        ("preprocess_brats.py", "nowhere"),
        ("preprocess_brats.py", tmp_path / "empty"),
        ("preprocess_brats.py", tmp_path / "empty", tmp_path / "file"),
        ("train_unet.py", "nowhere"),
        ("train_unet.py", tmp_path / "empty"),
        ("train_unet.py", tensors, "--fold", 9),
        ("train_unet.py", tensors, "--run-name", "first"),
        ("train_unet.py", tensors, "--amp", "fp16", "--device", "cpu"),
        ("train_unet.py", native),
        ("train_unet.py", native, "--patch", 40),
        ("train_unet.py", native, "--patch", 64),
        ("train_unet.py", tensors, "--patch", 16),
        ("train_swinunetr.py", tensors, "--patch", 48),
        ("train_swinunetr.py", tensors, "--window-size", 17),
        ("train_swinunetr.py", tensors, "--feature-size", 20),
        ("evaluate.py", RUN, "--ensemble"),
        ("evaluate.py", "nowhere"),
        ("evaluate.py", RUN, "--raw", tmp_path / "empty"),
        ("evaluate.py",),
        ("evaluate.py", RUN, "--split", "train"),
        ("evaluate.py", RUN, "--cases", tmp_path / "empty"),
        ("evaluate.py", RUN, "--cases", tmp_path, "--split", "test"),
        ("evaluate.py", RUN, "--small-et", "--split", "validation"),
        ("evaluate.py", "--predictions", tmp_path / "empty"),
        ("evaluate.py", "--predictions", tmp_path / "empty", "--raw", raw),
        ("evaluate.py", RUN, other),
        ("evaluate.py", RUN, "--data", tmp_path / "empty"),
        ("evaluate.py", RUN, "--out", tmp_path / "file"),
    ]
    for script, *arguments in bad:
        result = run_script(script, *arguments, cwd=trained, status=2)
        assert len(result.stderr.strip().splitlines()) == 1, (script, arguments, result.stderr)


def test_a_crash_shows_its_traceback_and_differs_in_status_from_failed_cases():
    """Those end with 3: see test_bad_cases_are_named_in_failures_csv_and_the_others_go_on."""
    code = "from models import cli; cli.run(lambda: {}['missing'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "KeyError: 'missing'" in done.stderr


def test_usage_errors_name_the_flag():
    for script, flag, value in (("train_unet.py", "--epochs", "0"), ("train_unet.py", "--flip-probability", "2"),
                                ("preprocess_brats.py", "--size", "x"), ("train_unet.py", "--learning-rate", "-1"),
                                ("preprocess_brats.py", "--test-share", "0.9"), ("train_unet.py", "--patch", "0"),
                                ("preprocess_brats.py", "--normalize", "minmax")):
        done = subprocess.run([sys.executable, ROOT / script, flag, value], capture_output=True, text=True)
        assert done.returncode == 2 and flag in done.stderr and value in done.stderr


@pytest.mark.slow
def test_the_real_road_writes_everything(real_cases, tmp_path):
    """Raw cases of a real data set to scores and pictures, as the README shows it."""
    run_script("preprocess_brats.py", real_cases, "tensors", "--size", 32, cwd=tmp_path)
    run_script("train_unet.py", "tensors", "--epochs", 2, "--run-name", "real", cwd=tmp_path)
    run_script("evaluate.py", "models/unet/results/real", cwd=tmp_path)
    assert (tmp_path / "models/unet/results/real/evaluation-test/overlay_worst.png").is_file()
    assert os.path.getsize(tmp_path / "models/unet/results/real/evaluation-test/per_case.csv") > 100
