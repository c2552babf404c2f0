"""Weights to hand on: made from a run, found by the name of their network."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import RUN, run_script

import train_swinunetr
from models import build_model
from models.brats import MODALITIES
from models.errors import InputError
from models.inference.predict import member_of, segment
from models.phantom import make_case
from models.pretrained import half_checkpoint
from models.runs import load_model, network_flags, open_run, suggest_heads


def test_weights_of_a_run_are_found_by_the_name_of_their_network(trained, raw, tmp_path):
    run_script("-m", "models.pretrained", (trained / RUN / "last.pt").resolve(), cwd=tmp_path)
    (made,) = tmp_path.glob("models/*/results/pretrained/best.pt")
    assert made.stat().st_size < 0.55 * (trained / RUN / "best.pt").stat().st_size
    original, last = load_model(trained / RUN / "last.pt")
    handed_on, _ = load_model(made)
    for weight, half in zip(original.parameters(), handed_on.parameters(), strict=True):
        assert torch.allclose(weight, half, rtol=1e-3, atol=1e-7)
    assert open_run(made).epoch == last["epoch"] and open_run(made).split == open_run(trained / RUN).split
    case, picture = open_run(made).split["train"][0], tmp_path / "case.png"
    result = run_script("view_interactive_4pane_brats.py", raw / case, "--run", "unet", "--save", picture, cwd=tmp_path)
    assert picture.is_file() and "segmented by unet, which was trained on this patient, in" in result.stdout


def test_weights_of_heads_stand_beside_those_of_patients(trained, tmp_path):
    run_script("-m", "models.pretrained", (trained / RUN / "last.pt").resolve(), "--heads", cwd=tmp_path)
    (made,) = tmp_path.glob("models/*/results/*/best.pt")
    assert made.parent.name == "pretrained-heads" and open_run(made).name == "unet-heads"


def test_a_weight_that_float16_cannot_hold_is_refused():
    checkpoint = {"format": 1, "model": {"good": torch.ones(2), "output.bias": torch.tensor([1e6])}}
    with pytest.raises(InputError, match=r"output.bias: .* 1e\+06"):
        half_checkpoint(checkpoint)


def test_weights_that_are_not_there_are_refused_in_one_line(raw, tmp_path):
    result = run_script("view_interactive_4pane_brats.py", raw / "BraTS2021_00000", "--run", "swinunetr", "--save",
                        tmp_path / "case.png", cwd=tmp_path, status=2)  # fmt: skip
    assert "pretrained/best.pt" in result.stderr


# ---- those that come with the project ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "megabytes", "cases"),
    [("unet", 12, 12), ("swinunetr", 35, 12), ("unet-heads", 12, 64), ("swinunetr-heads", 35, 64)],
)
def test_the_weights_that_come_with_the_project_find_the_tumour_of_a_synthetic_head(name, megabytes, cases):
    """They have seen twelve patients and other synthetic heads, or these alone."""
    run = open_run(name)
    assert run.name == name and run.checkpoint.stat().st_size <= megabytes * 1e6 and len(run.split["train"]) == cases
    volumes, truth, affine = make_case(seed=1, index=0)
    image = np.stack([volumes[modality] for modality in MODALITIES])
    member = member_of(run, load_model(name)[0], None)
    prediction = segment(image, affine, member, run.preprocessing, torch.device("cpu"))
    overlap = 2 * ((prediction > 0) & (truth > 0)).sum() / ((prediction > 0).sum() + (truth > 0).sum())
    assert overlap > 0.85


@pytest.mark.parametrize(
    ("patients", "channels", "normalize", "suggested"),
    [(23, (16, 32, 64, 128, 256), "percentile", True), (23, (8, 16, 32, 64, 128), "percentile", False),
     (23, (16, 32, 64, 128, 256), "zscore", False), (1000, (16, 32, 64, 128, 256), "percentile", False)],
    ids=["few", "other network", "other images", "many"],
)  # fmt: skip
def test_a_training_of_few_patients_is_told_of_weights_that_fit(tmp_path, capsys, patients, channels, normalize,
                                                                suggested):  # fmt: skip
    settings = {"size": 64, "spacing_mm": 1.0, "normalize": normalize}
    (tmp_path / "manifest.json").write_text(json.dumps({"settings": settings, "cases": {}}))
    split = {"train": [f"BraTS2021_{index:05d}" for index in range(patients)]}
    suggest_heads(build_model("unet", channels=channels), tmp_path, split)
    assert ("--init unet-heads" in capsys.readouterr().out) == suggested


def test_a_training_that_begins_with_them_has_their_network_unless_flags_say_otherwise(monkeypatch):
    def started(*flags):
        monkeypatch.setattr(sys, "argv", ["train_swinunetr.py", "DATA", "--init", "swinunetr", *flags])
        args = train_swinunetr.arguments()
        return train_swinunetr.arguments(network_flags(args.init, vars(args)))

    args = started()
    assert (args.feature_size, args.window_size, args.v2, args.no_attention) == (12, 4, False, False)
    args = started("--window-size", "7", "--v2")
    assert (args.feature_size, args.window_size, args.v2, args.no_attention) == (12, 7, True, False)
