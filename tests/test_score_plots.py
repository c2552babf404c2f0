"""The figures of an evaluation can be drawn of few and many runs and cases."""

import warnings

import numpy as np
import pytest
from conftest import make_score_rows
from PIL import Image
from test_panels import plain_panel

from models.evaluation.score_plots import draw_scores, draw_sheets, paired_dice
from models.evaluation.statistics import BINS
from models.plots import prediction_overlay

RUNS = ["unet", "swinunetr", "ensemble", "a cross-validation of a long name", "a run of a rather long name"]


def counts_of(runs):
    voxels = np.array([1e6, *[100.0] * (BINS - 2), 0])
    return {run: np.array([[voxels, voxels * np.linspace(0, 1, BINS), voxels / 2]] * 3) for run in runs}


@pytest.mark.parametrize(("runs", "cases"), [(1, 1), (2, 4), (5, 30)])
def test_all_figures_are_drawn_and_none_is_empty(runs, cases, tmp_path):
    rows = make_score_rows(RUNS[:runs], [str(case) for case in range(cases)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as text that does not fit, or a logarithm of 0
        figures = draw_scores(rows, counts_of(RUNS[:runs]), tmp_path, "some cases")
    assert len(figures) == 3
    for path in figures.values():
        picture = np.asarray(Image.open(path).convert("L"))
        assert picture.shape[1] >= 800 and (picture < 100).sum() > 1000
        assert (picture[:, [0, 1, -2, -1]] == 255).all(), "text is cut off at a side"


def test_without_probabilities_there_is_no_reliability(tmp_path):
    figures = draw_scores(make_score_rows(["a"], ["1", "2"]), {}, tmp_path, "two cases")
    assert sorted(path.name for path in figures.values()) == ["dice_over_volume.png", "scores.png"]


def test_the_p_values_of_many_runs_do_not_leave_the_picture(tmp_path):
    dice = {f"a run of a rather long name {number}": [0.5, 0.6] for number in range(9)}
    scores = dict.fromkeys(("WT", "TC", "ET"), dice)
    notes = dict.fromkeys(scores, "Holm-corrected p " + ", ".join(["0.0073"] * 8))
    paired_dice(scores, tmp_path / "paired.png", "two cases", notes)
    picture = np.asarray(Image.open(tmp_path / "paired.png").convert("L"))
    assert (picture[:, [0, 1, 2, -3, -2, -1]] == 255).all()


def test_names_and_title_of_an_overlay_of_many_runs_stay_inside_the_picture(tmp_path):
    image, label = np.random.default_rng(0).random((4, 8, 8, 8), np.float32), np.ones((8, 8, 8), np.uint8)
    names = [f"swinunetr-phantoms-real-96-seed{number}" for number in range(5)]
    title = "a case\n" + ", ".join(f"{name} 0.123" for name in names)
    prediction_overlay(image, label, dict.fromkeys(names, label), tmp_path / "overlay.png", title)
    picture = np.asarray(Image.open(tmp_path / "overlay.png").convert("L"))
    assert (picture[:, [0, 1, -2, -1]] == 0).all()
    written = (picture[:, :60] > 50).any(1)  # the names at the left, from bottom to top
    assert np.count_nonzero(np.diff(written.astype(int)) == 1) >= len(names) + 2, "names run into each other"


def test_every_run_has_its_sheets_with_or_without_scores(tmp_path):
    panels = {run: {str(case): plain_panel("red") for case in range(61)} for run in "ab"}
    sheets = draw_sheets(make_score_rows(["a"], ["1"]), panels, tmp_path)
    assert sheets == {run: tmp_path / f"contact_sheet_{run}_1.jpg" for run in "ab"}
    names = {f"contact_sheet_{run}_{number}.jpg" for run in "ab" for number in (1, 2)}
    assert {path.name for path in tmp_path.iterdir()} == names
