"""The small picture of a case, by the colours of its pixels, and the sheets of them."""

import io

import numpy as np
import pytest
from PIL import Image

from models.evaluation.panels import GAP, PANEL_HEIGHT, SHEET_COLUMNS, SHEET_ROWS, TILE, case_panel, contact_sheets

SHAPE = (40, 48, 30)


def pixels(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")).astype(int)  # [rows, columns, 3]


def tiles(jpeg: bytes) -> list[np.ndarray]:
    """The pictures of a panel from left to right, without their names."""
    picture = pixels(jpeg)[PANEL_HEIGHT - TILE[1] :]
    return [picture[:, left : left + TILE[0]] for left in range(0, picture.shape[1], TILE[0] + GAP)]


def colored(tile: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels that are not grey."""
    return np.nonzero(np.ptp(tile, axis=2) > 60)


def grey_head(shape=SHAPE) -> np.ndarray:
    return np.random.default_rng(0).integers(400, 600, (4, *shape)).astype(np.int16)


def label_with(voxels, value=3, shape=SHAPE) -> np.ndarray:
    label = np.zeros(shape, np.uint8)
    label[voxels] = value
    return label


def test_the_patients_right_is_on_the_left_and_anterior_is_up():
    right_anterior = label_with(np.s_[32:37, 38:44, 10:20])  # RAS: the index grows to right, anterior, superior
    _, truth, prediction = tiles(case_panel(grey_head(), right_anterior, right_anterior))
    for tile in (truth, prediction):
        rows, columns = colored(tile)
        assert len(rows) and columns.max() < TILE[0] / 2 and rows.max() < TILE[1] / 2


def test_truth_and_prediction_have_a_picture_each():
    left, right = label_with(np.s_[3:8, 20:28, 10:20]), label_with(np.s_[32:37, 20:28, 10:20])
    flair, truth, prediction = tiles(case_panel(grey_head(), prediction=left, truth=right))
    assert len(colored(flair)[0]) == 0
    assert colored(truth)[1].max() < TILE[0] / 2 < colored(prediction)[1].min()


def test_the_slice_is_the_one_with_most_true_tumour():
    truth = label_with(np.s_[18:22, 20:28, 5]) | label_with(np.s_[10:30, 10:38, 21])
    small = label_with(np.s_[10:30, 10:38, 5])
    _, truth_tile, prediction_tile = tiles(case_panel(grey_head(), small, truth))
    assert len(colored(truth_tile)[0]) > 0 and len(colored(prediction_tile)[0]) == 0


@pytest.mark.parametrize("truth", [None, np.zeros(SHAPE, np.uint8)])
def test_without_true_tumour_the_prediction_chooses_the_slice(truth):
    *_, prediction = tiles(case_panel(grey_head(), label_with(np.s_[10:30, 10:38, 25]), truth))
    assert len(colored(prediction)[0]) > 0


def test_what_is_not_given_has_no_picture():
    label, spread = label_with(np.s_[10:20, 10:20, 10:20]), np.zeros(SHAPE, np.float32)
    assert len(tiles(case_panel(grey_head(), label))) == 2
    assert len(tiles(case_panel(grey_head(), label, spread=spread))) == 3
    assert len(tiles(case_panel(grey_head(), label, label, spread))) == 4


def test_the_spread_is_drawn_where_predictions_differ():
    label = label_with(np.s_[10:20, 10:20, 10:20])
    spread = np.zeros(SHAPE, np.float32)
    spread[30:38, 20:28, 10:20] = 0.4  # the patient's right
    rows, columns = colored(tiles(case_panel(grey_head(), label, spread=spread))[-1][:, : TILE[0] - 12])
    assert len(rows) and columns.max() < TILE[0] / 2


def test_voxels_keep_their_proportions():
    head = np.zeros((4, 60, 60, 20), np.int16)
    head[:, 10:50, 20:40] = grey_head((40, 20, 20))  # 40 voxels of 1 mm by 20 of 2 mm is a square
    tile = tiles(case_panel(head, np.zeros((60, 60, 20), np.uint8), spacing_mm=(1, 2, 3)))[1]
    rows, columns = np.nonzero(tile.min(2) > 40)
    assert np.ptp(rows) == pytest.approx(np.ptp(columns), abs=3)
    assert np.ptp(columns) == pytest.approx(TILE[0], abs=3)  # and the air around it is cut off


def test_views_of_any_type_and_empty_images_can_be_drawn():
    views = grey_head()[:, ::-1, ::-1].astype(np.float32)
    label = label_with(np.s_[10:20, 10:20, 10:20])[::-1, ::-1]
    assert len(tiles(case_panel(views, label, label))) == 3
    assert len(tiles(case_panel(np.zeros((4, *SHAPE), np.float32), np.zeros(SHAPE, np.uint8)))) == 2


def plain_panel(color) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (500, PANEL_HEIGHT), color).save(file, "JPEG")
    return file.getvalue()


def test_sheets_begin_with_the_lowest_dice_and_end_with_the_cases_without_one():
    panels = {"good": plain_panel("lime"), "none": plain_panel("blue"), "bad": plain_panel("red")}
    (sheet,) = contact_sheets(panels, {"good": 0.9, "bad": 0.1}, "run")
    row = pixels(sheet)[120]  # across the pictures
    seen = [int(color.argmax()) for color in row if color.max() > 200]
    assert seen == sorted(seen) and set(seen) == {0, 1, 2}  # red, lime, blue


def test_a_sheet_has_a_limited_number_of_cases():
    full = SHEET_COLUMNS * SHEET_ROWS
    cases = [f"a case of a rather long name, which is number {number}" for number in range(full + 1)]
    shapes = [pixels(sheet).shape for sheet in contact_sheets(dict.fromkeys(cases, plain_panel("red")), {}, "run")]
    assert len(shapes) == 2 and shapes[1][0] < 2 * shapes[0][0] / SHEET_ROWS and shapes[1][1] < shapes[0][1] / 2
