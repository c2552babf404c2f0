"""evaluate.py as a user runs it, on runs, folds, folders of cases and label maps: what it writes and refuses."""

import json
import re
import shutil
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import torch
from conftest import RUN, read, run_script
from scipy import ndimage

from models import build_model
from models.cases import find_cases
from models.runs import load_model

SWIN_RUN = "models/swinunetr/results/swin"
EXTREMES = ("best", "median", "worst")


@pytest.fixture(scope="module")
def compared(trained, tensors):
    """What evaluate.py said of the U-Net's run and one of a small Swin UNETR, and the folder that it wrote."""
    flags = ["--feature-size", 12, "--window-size", 4, "--checkpointing", "blocks", "--epochs", 1, "--amp", "off",
             "--run-name", "swin"]  # fmt: skip
    training = run_script("train_swinunetr.py", tensors, *flags, cwd=trained)
    evaluation = run_script("evaluate.py", RUN, SWIN_RUN, "--ensemble", "--split", "train", "--allow-trained-on",
                            "--space", "network", "--out", "compared", cwd=trained)  # fmt: skip
    return training, evaluation, trained / "compared"


def test_evaluation_writes_scores_and_overlays_and_agrees_with_the_training_script(trained):
    result = run_script("evaluate.py", RUN, "--engine", "eager", "--space", "network", cwd=trained)
    out = trained / RUN / "evaluation-test"
    rows = read(out / "per_case.csv")
    tested = {row["case"]: row for row in read(trained / RUN / "test_results.csv")}
    for row in rows:
        assert float(row["dice"]) == pytest.approx(float(tested[row["case"]][f"dice_{row['target']}"]), abs=1e-5)
    assert {row["target"] for row in rows} == {"WT", "TC", "ET", "NCR", "ED"}
    summary = json.loads((out / "summary.json").read_text())["runs"]["first"]
    mean = np.mean([float(row["dice"]) for row in rows if row["target"] == "WT"])
    assert summary["scores"]["network"]["WT"]["dice"]["mean"] == pytest.approx(mean, abs=1e-5)
    pictures = {"scores.png", "dice_over_volume.png", "reliability.png", *(f"overlay_{k}.png" for k in EXTREMES)}
    assert {path.name for path in out.glob("*.png")} == pictures
    assert {"report.html", "contact_sheet_first_1.jpg"} <= {path.name for path in out.iterdir()}
    assert "truth and prediction empty" in result.stdout


def test_evaluation_in_native_space_writes_nifti_on_the_original_grid(trained, raw):
    run_script("evaluate.py", RUN, "--tta", "--save-nifti", "nifti", "--out", "native", cwd=trained)
    rows = read(trained / "native/per_case.csv")
    assert {row["space"] for row in rows} == {"native"}
    case = rows[0]["case"]
    written, original = nibabel.load(trained / f"nifti/{case}.nii.gz"), nibabel.load(raw / case / f"{case}_seg.nii.gz")
    assert written.shape == original.shape and np.array_equal(written.affine, original.affine)
    prediction, truth = np.asarray(written.dataobj), np.asarray(original.dataobj)
    assert set(np.unique(prediction)) <= {0, 1, 2, 4}
    score = next(r for r in rows if r["case"] == case and r["target"] == "WT")
    both = np.logical_and(prediction > 0, truth > 0).sum()
    assert float(score["dice"]) == pytest.approx(2 * both / ((prediction > 0).sum() + (truth > 0).sum()), abs=1e-5)


def test_islands_are_dropped_from_what_is_scored_and_written(trained, raw):
    shutil.copytree(trained / RUN, trained / "scattered")
    checkpoint = torch.load(trained / "scattered/best.pt", weights_only=True)
    output = [name for name in checkpoint["model"] if name.endswith("conv.weight")][-1]
    checkpoint["model"][output] = torch.randn(checkpoint["model"][output].shape, generator=torch.manual_seed(0))
    torch.save(checkpoint, trained / "scattered/best.pt")

    def parts(folder, *flags):
        """How many parts the first case's tumour has, and whether the scores are those of the saved label map."""
        run_script("evaluate.py", "scattered", *flags, "--save-nifti", folder, "--out", f"{folder}-out", cwd=trained)
        row = next(row for row in read(trained / f"{folder}-out/per_case.csv") if row["target"] == "WT")
        case = row["case"]
        prediction = np.asarray(nibabel.load(trained / folder / f"{case}.nii.gz").dataobj) > 0
        truth = np.asarray(nibabel.load(raw / case / f"{case}_seg.nii.gz").dataobj) > 0
        dice = 2 * (prediction & truth).sum() / (prediction.sum() + truth.sum())
        assert float(row["dice"]) == pytest.approx(dice, abs=1e-5)
        return ndimage.label(prediction, np.ones((3, 3, 3)))[1]

    assert parts("all") > 1 and parts("largest", "--islands", 1) == 1
    assert "parts of WT, TC or ET below 100% of the largest" in (trained / "largest-out/report.html").read_text()


@pytest.mark.slow
def test_two_processes_write_what_one_writes(trained):
    """Each predicts a share of the cases; the tables and pictures are the same, but for the times."""
    flags = [RUN, "--split", "train", "--allow-trained-on", "--engine", "eager", "--out"]
    run_script("evaluate.py", *flags, "alone", cwd=trained)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "evaluate.py",
               *flags, "shared"]  # fmt: skip
    done = subprocess.run(command, cwd=trained, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Written to shared") == 1 and done.stdout.count("10 train cases") == 1
    files = sorted(path.name for path in (trained / "alone").iterdir())
    assert sorted(path.name for path in (trained / "shared").iterdir()) == files
    for name in files:
        alone, shared = ((trained / folder / name).read_bytes() for folder in ("alone", "shared"))
        if name == "summary.json":
            alone, shared = (re.sub(rb'"forward_seconds_per_case": .*', b"", text) for text in (alone, shared))
        assert alone == shared, name


@pytest.mark.slow
def test_scores_of_saved_predictions_are_those_of_the_run_that_made_them(trained, raw):
    """Any folder of raw cases is predicted; what was written is read and scored like the label maps of others."""
    flags = "--label-values", "brats2023", "--allow-trained-on"
    run_script("evaluate.py", RUN, "--cases", raw, "--save-nifti", "maps", "--out", "own", *flags, cwd=trained)
    assert {path.name for path in (trained / "maps").iterdir()} == {f"{case.name}.nii.gz" for case in find_cases(raw)}
    values = {value for path in (trained / "maps").iterdir() for value in np.unique(nibabel.load(path).dataobj)}
    assert values <= {0, 1, 2, 3}
    foreign = "evaluate.py", "--predictions", "maps", "--raw", raw, "--label-values", "brats2023", "--out", "foreign"
    run_script(*foreign, cwd=trained)
    own, again = (read(trained / folder / "per_case.csv") for folder in ("own", "foreign"))
    for row in own + again:
        del row["run"], row["ceiling_dice"], row["trained_on"]
    assert own == again
    (trained / "maps/extra.nii.gz").touch()
    assert "unknown cases: extra" in run_script(*foreign, cwd=trained, status=2).stderr


@pytest.mark.parametrize("flags", [["--islands", 0.1], ["--small-et"], ["--ensemble"], ["--save-nifti", "out"]])
def test_label_maps_of_another_program_are_scored_as_they_are(flags, tmp_path):
    refused = run_script("evaluate.py", "--predictions", "maps", "--raw", "raw", *flags, cwd=tmp_path, status=2)
    assert "scored as they are" in refused.stderr and refused.stderr.count("\n") == 1


def test_a_folder_of_cases_needs_no_truth_and_survives_a_damaged_one(trained, raw, tmp_path):
    """The others are predicted; the status is 3 and failures.csv says why."""
    first, second = find_cases(raw)[:2]
    for case in (first, second):
        shutil.copytree(raw / case.name, tmp_path / "new" / case.name)
        (tmp_path / "new" / case.name / f"{case.name}_seg.nii.gz").unlink()
    damaged = tmp_path / "new" / second.name / f"{second.name}_t2.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    done = run_script("evaluate.py", RUN, "--cases", tmp_path / "new", "--save-nifti", tmp_path / "maps",
                      "--out", tmp_path / "out", "--allow-trained-on", cwd=trained, status=3)  # fmt: skip
    assert [path.name for path in (tmp_path / "maps").iterdir()] == [f"{first.name}.nii.gz"]
    assert [row["case"] for row in read(tmp_path / "out/failures.csv")] == [second.name] and damaged.name in done.stderr
    assert first.name in (tmp_path / "out/report.html").read_text() and not (tmp_path / "out/per_case.csv").exists()


def test_nobody_is_scored_on_what_it_was_trained_on_unless_told_to(trained, raw):
    refused = run_script("evaluate.py", RUN, "--cases", raw, cwd=trained, status=2).stderr
    assert "trained on" in refused and "--allow-trained-on" in refused
    run_script("evaluate.py", RUN, "--cases", raw, "--allow-trained-on", "--out", "all", cwd=trained)
    trained_on = set(json.loads((trained / RUN / "config.json").read_text())["split"]["train"])
    marked = {row["case"] for row in read(trained / "all/per_case.csv") if row["trained_on"] == "True"}
    assert marked == trained_on


@pytest.mark.slow
def test_folds_are_scored_together_each_on_what_it_has_not_seen(trained, tensors):
    for fold in (0, 1):
        run_script("train_unet.py", tensors, "--fold", fold, "--epochs", 1, "--run-name", f"cv-fold{fold}",
                   "--amp", "off", cwd=trained)  # fmt: skip
    runs = [f"models/unet/results/cv-fold{fold}" for fold in (0, 1)]
    done = run_script("evaluate.py", *runs, "--ensemble", "--out", "folds", "--space", "network", cwd=trained)
    splits = json.loads((tensors / "splits.json").read_text())
    rows = read(trained / "folds/per_case.csv")
    held_out = {case for fold in splits["folds"][:2] for case in fold["validation"]}
    expected = {("cv", case) for case in held_out} | {("cv-ensemble", case) for case in splits["test"]}
    assert {(row["run"], row["case"]) for row in rows} == expected
    # The oracle: the run that did not see the case.
    case = splits["folds"][1]["validation"][0]
    loaded = torch.load(tensors / f"{case}.pt", weights_only=True)
    with torch.no_grad():
        predicted = load_model(trained / runs[1])[0](loaded["image"][None]).argmax(1)[0] > 0
    true = loaded["label"][0] > 0
    row = next(row for row in rows if (row["run"], row["case"], row["target"]) == ("cv", case, "WT"))
    dice = 2 * (predicted & true).sum() / (predicted.sum() + true.sum())
    assert float(row["dice"]) == pytest.approx(dice.item(), abs=1e-3)
    assert "cross-validated in 2 folds" in done.stdout and "best epoch" in done.stdout
    again = shutil.copytree(trained / runs[0], trained / f"{runs[0]}-again")
    assert "both fold 0" in run_script("evaluate.py", runs[0], again, cwd=trained, status=2).stderr


def test_tensors_that_were_not_made_from_these_files_are_refused(trained, raw, tmp_path):
    shutil.copytree(raw, tmp_path / "raw")
    case = read(trained / RUN / "test_results.csv")[0]["case"]
    path = tmp_path / "raw" / case / f"{case}_seg.nii.gz"
    path.write_bytes(path.read_bytes() + bytes(1))
    other = "evaluate.py", RUN, "--raw", tmp_path / "raw"
    assert "its size differs" in run_script(*other, cwd=trained, status=2).stderr
    shutil.rmtree(tmp_path / "raw" / case)
    assert case in run_script(*other, cwd=trained, status=2).stderr


def copy_of_the_run(trained, folder, data=None):
    """The trained run in another folder, recorded as trained on `data` if that is given."""
    shutil.copytree(trained / RUN, trained / folder, ignore=shutil.ignore_patterns("evaluation-*"), dirs_exist_ok=True)
    if data:
        config = json.loads((trained / folder / "config.json").read_text())
        config["arguments"]["data"] = data
        (trained / folder / "config.json").write_text(json.dumps(config))
    return trained / folder


def test_two_networks_with_runs_of_one_name_are_told_apart(trained):
    twin = copy_of_the_run(trained, "models/swinunetr/results/first")
    tiny = {"feature_size": 12, "window_size": 2, "depths": [1, 1, 1, 1]}
    model = build_model("swinunetr", **tiny)
    checkpoint = torch.load(twin / "best.pt", weights_only=True)
    changed = {"network": "swinunetr", "config": model.config, "model": model.state_dict()}
    torch.save(checkpoint | changed, twin / "best.pt")
    run_script("evaluate.py", RUN, twin, "--out", "both", cwd=trained)
    assert {row["run"] for row in read(trained / "both/per_case.csv")} == {"unet-first", "swinunetr-first"}
    assert (trained / "both/swinunetr-first_overlay_worst.png").is_file()


def test_the_transformer_says_what_it_costs_before_it_trains_and_records_it(compared, trained):
    training, _, _ = compared
    (line,) = [line for line in training.stdout.splitlines() if line.startswith("swinunetr: ")]
    assert training.stdout.index(line) < training.stdout.index("Trained in")
    config = json.loads((trained / SWIN_RUN / "config.json").read_text())
    for said in ("million parameters", "GMAC", "TFLOP", f"{config['expected_peak_gib']:.2f} GiB"):
        assert said in line
    assert config["model"]["window_size"] == 4 and config["model"]["checkpointing"] == "blocks"
    assert config["parameters"] == sum(p.numel() for p in build_model("swinunetr", **config["model"]).parameters())


def test_two_runs_are_compared_case_by_case(compared, trained):
    _, evaluation, out = compared
    summary = json.loads((out / "summary.json").read_text())
    rows = read(out / "per_case.csv")
    table = {row["run"]: row for row in read(out / "comparison.csv")}
    assert [row["model"] for row in table.values()] == ["unet", "swinunetr", "unet+swinunetr"]
    assert list(table) == ["first", "swin", "ensemble"]
    for run, row in table.items():
        dice = [float(r["dice"]) for r in rows if r["run"] == run and r["target"] == "TC"]
        assert len(dice) == 10 and float(row["dice_TC"]) == pytest.approx(np.mean(dice), abs=1e-5)
    trained_s = sum(float(row["seconds"]) for row in read(trained / SWIN_RUN / "train.csv"))
    assert float(table["swin"]["training_minutes"]) == pytest.approx(trained_s / 60, rel=1e-4)
    assert float(table["ensemble"]["gmac"]) == pytest.approx(
        float(table["first"]["gmac"]) + float(table["swin"]["gmac"]), rel=1e-4
    )
    pairs = {(row["first"], row["second"]) for row in summary["comparisons"]}
    assert pairs == {("first", "swin"), ("first", "ensemble")}
    assert "Wilcoxon p" in evaluation.stdout and "GMAC" in evaluation.stdout
    pictures = {path.name for path in out.glob("comparison*.png")}
    assert pictures == {"comparison_dice.png", *(f"comparison_overlay_{place}.png" for place in (1, 2, 3))}


def test_the_ensemble_is_the_mean_of_the_probabilities(compared, trained, tensors):
    _, _, out = compared
    case = next(row["case"] for row in read(out / "per_case.csv"))
    loaded = torch.load(tensors / f"{case}.pt", weights_only=True)
    with torch.no_grad():
        probabilities = sum(load_model(trained / run)[0](loaded["image"][None]).softmax(1) for run in (RUN, SWIN_RUN))
    predicted, truth = probabilities.argmax(1)[0] > 0, loaded["label"][0] > 0
    expected = 2 * (predicted & truth).sum() / (predicted.sum() + truth.sum())
    row = next(r for r in read(out / "per_case.csv") if (r["run"], r["case"], r["target"]) == ("ensemble", case, "WT"))
    assert float(row["dice"]) == pytest.approx(expected.item(), abs=1e-3)


def test_runs_that_cannot_be_told_apart_or_saw_other_data_are_refused(trained, raw):
    same = run_script("evaluate.py", RUN, copy_of_the_run(trained, "copy/first"), cwd=trained, status=2)
    assert "both called unet-first" in same.stderr
    run_script("preprocess_brats.py", raw, "elsewhere", "--size", 48, cwd=trained)
    other = copy_of_the_run(trained, "copy/second", data="elsewhere")
    assert "say which with --data" in run_script("evaluate.py", RUN, other, cwd=trained, status=2).stderr


def test_a_run_given_twice_is_refused(trained):
    for again in (RUN, f"{RUN}/best.pt", f"{RUN}/../first"):
        refused = run_script("evaluate.py", RUN, again, cwd=trained, status=2).stderr
        assert "given twice" in refused and len(refused.splitlines()) == 1


def test_a_run_called_ensemble_is_not_mixed_up_with_the_ensemble(trained):
    refused = run_script("evaluate.py", RUN, copy_of_the_run(trained, "copy/ensemble"), "--ensemble", cwd=trained,
                         status=2).stderr  # fmt: skip
    assert "a run is called ensemble as well" in refused and len(refused.splitlines()) == 1
