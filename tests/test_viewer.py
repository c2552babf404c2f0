"""The viewer, driven by matplotlib's own events without a display."""

import os
import subprocess
import sys

import nibabel
import numpy as np
import pytest
from conftest import LPS, ROOT, make_head, run_script, write_raw_case
from matplotlib.backend_bases import FigureCanvasBase, KeyEvent, MouseEvent, ResizeEvent
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from test_nifti import turned

from models.errors import InputError
from models.plots import intensity_window
from models.viewer.drawing import Line, SlicePicture
from models.viewer.scene import find_scenes, read_prediction
from models.viewer.segmentation import with_prediction
from models.viewer.window import Viewer, new_figure

SCRIPT = "view_interactive_4pane_brats.py"


def open_scene(folder):
    return next(iter(find_scenes(folder, None).values()))()


@pytest.fixture
def viewer(tmp_path):
    write_raw_case(tmp_path, "C")
    return Viewer(new_figure(with_window=False), open_scene(tmp_path))


def key(viewer, name):
    viewer.figure.canvas.callbacks.process("key_press_event", KeyEvent("key_press_event", viewer.figure.canvas, name))


def scroll(viewer, button):
    event = MouseEvent("scroll_event", viewer.figure.canvas, 10, 10, button, step=1)
    viewer.figure.canvas.callbacks.process("scroll_event", event)


def test_it_opens_on_the_slice_with_most_tumour(viewer):
    areas = np.count_nonzero(viewer.scene.maps["truth"], axis=(0, 1))
    assert viewer.index == areas.argmax()


def test_wheel_and_keys_move_and_stop_at_the_ends(viewer):
    start = viewer.index
    scroll(viewer, "up")
    key(viewer, "up")
    scroll(viewer, "down")
    assert viewer.index == start + 1
    key(viewer, "pageup")
    assert viewer.index == start + 11
    key(viewer, "end")
    scroll(viewer, "up")
    assert viewer.index == 39
    key(viewer, "home")
    scroll(viewer, "down")
    assert viewer.index == 0
    key(viewer, "m")
    assert viewer.index == start


def test_what_is_drawn_changes_with_the_slice(viewer):
    before = np.array(viewer.panes[0].get_array())
    key(viewer, "up")
    assert not np.array_equal(before, viewer.panes[0].get_array())


def test_overlay_goes_on_and_off_and_changes_opacity(viewer):
    assert viewer.overlays[0].get_visible()
    assert viewer.overlays[0].get_array()[..., 3].max() == round(0.5 * 255)
    key(viewer, "]")
    assert viewer.overlays[0].get_array()[..., 3].max() == round(0.6 * 255)
    key(viewer, "o")
    assert not viewer.overlays[0].get_visible()


@pytest.mark.parametrize(("plane", "corner"), [("1", "left top"), ("2", "left top"), ("3", "right top")])
@pytest.mark.parametrize("affine", [LPS, np.eye(4)])
def test_orientation_is_radiological(tmp_path, plane, corner, affine):
    """A bright block in the patient's right anterior superior corner, placed by the affine alone."""
    folder, volumes, _ = write_raw_case(tmp_path, "C", affine=affine)
    volume = volumes["t1"]
    world = np.stack(np.meshgrid(*(np.arange(n) for n in volume.shape), indexing="ij"), -1) @ affine[:3, :3].T
    high = world.max((0, 1, 2)) - 6
    volume[(world > high).all(-1)] = 30000
    nibabel.save(nibabel.Nifti1Image(volume, affine), folder / "C_t1.nii.gz")
    viewer = Viewer(new_figure(with_window=False), open_scene(tmp_path))
    key(viewer, plane)
    key(viewer, "end")
    rows, columns = np.nonzero(viewer.panes[0].get_array() == 30000)
    height, width = viewer.panes[0].get_array().shape
    assert rows.max() < height / 2
    assert columns.max() < width / 2 if corner.startswith("left") else columns.min() > width / 2


def test_volumes_in_ml_come_from_the_voxel_size(tmp_path):
    _, _, label = write_raw_case(tmp_path, "C", affine=np.diag([-2.0, -1.0, 3.0, 1.0]))
    viewer = Viewer(new_figure(with_window=False), open_scene(tmp_path))
    texts = [text.get_text() for text in viewer.figure.legends[0].get_texts()]
    for value, text in zip((1, 2, 3), texts, strict=True):
        assert f"{(label == value).sum() * 6 / 1000:.1f} ml" in text


def test_the_status_line_shows_voxel_mm_and_intensities_of_the_file(tmp_path):
    _, volumes, _ = write_raw_case(tmp_path, "C")
    viewer = Viewer(new_figure(with_window=False), open_scene(tmp_path))
    viewer.go_to(20)
    # LPS: file voxel (i, j, k) has RAS index (43 - i, 47 - j, k) and is drawn at column i, 47 - j from below
    text = viewer.describe(15 + 0.5, 47 - 30 + 0.5)
    assert "voxel (15, 30, 20)" in text and "RAS (-15.0, 209.0, 20.0) mm" in text
    for modality in ("t1", "t1ce", "t2", "flair"):
        assert f"{modality.upper()} {volumes[modality][15, 30, 20]}" in text


def test_the_wheel_brings_the_cursor_to_another_slice(viewer):
    x, y = viewer.panes[0].axes.transData.transform((20.5, 20.5))
    event = MouseEvent("scroll_event", viewer.figure.canvas, x, y, "up", step=1)
    viewer.figure.canvas.callbacks.process("scroll_event", event)
    assert viewer.status.get_text() == viewer.describe(20.5, 20.5)
    assert f", {viewer.index})" in viewer.status.get_text()


def test_truth_and_prediction_swap_with_their_dice(tmp_path):
    _, _, label = write_raw_case(tmp_path, "C")
    prediction = np.where(label == 3, 4, label).astype(np.uint8)
    prediction[label == 3] = 0  # ET missed
    nibabel.save(nibabel.Nifti1Image(prediction, LPS), tmp_path / "prediction.nii.gz")
    scene = open_scene(tmp_path / "C")
    scene = with_prediction(scene, read_prediction(tmp_path / "prediction.nii.gz", scene))
    viewer = Viewer(new_figure(with_window=False), scene)
    whole, missed = (label > 0).sum(), (label == 3).sum()
    assert f"WT {2 * (whole - missed) / (2 * whole - missed):.3f}" in viewer.legend_text.get_text()
    assert "ET 0.000" in viewer.legend_text.get_text()
    assert "filled: prediction" in viewer.legend_text.get_text()
    assert "outline: truth" in viewer.legend_text.get_text()
    key(viewer, "t")
    assert "filled: truth" in viewer.legend_text.get_text()
    assert "outline: prediction" in viewer.legend_text.get_text()
    key(viewer, "t")
    assert "filled: prediction" in viewer.legend_text.get_text()


@pytest.mark.parametrize("codes", ["LPS", "RAS", "SAR"])
def test_a_prediction_may_have_label_values_and_an_axis_order_of_its_own(tmp_path, codes):
    """nnU-Net's 0 to 3, as NCR, ED, ET or as ED, NCR, ET, for a case whose enhancing tumour is 4."""
    write_raw_case(tmp_path, "C")
    scene = open_scene(tmp_path / "C")
    label = make_head()[1]
    for scheme, raw_values in (("brats2023", (0, 1, 2, 3)), ("msd", (0, 2, 1, 3))):
        prediction = np.array(raw_values, np.uint8)[label]
        nibabel.save(nibabel.Nifti1Image(*turned(prediction, LPS, codes)), tmp_path / "p.nii.gz")
        assert np.array_equal(read_prediction(tmp_path / "p.nii.gz", scene, scheme), scene.maps["truth"])


def test_label_values_that_the_case_does_not_have_are_refused_with_the_flag(tmp_path):
    _, _, label = write_raw_case(tmp_path, "C")
    nibabel.save(nibabel.Nifti1Image(label, LPS), tmp_path / "p.nii.gz")
    command = (SCRIPT, "C", "--prediction", "p.nii.gz", "--save", "a.png")
    refused = run_script(*command, cwd=tmp_path, status=2)
    assert "label value 3" in refused.stderr and "--prediction-labels" in refused.stderr
    run_script(*command, "--prediction-labels", "brats2023", cwd=tmp_path)
    assert (tmp_path / "a.png").exists()


def test_a_prediction_on_another_grid_is_refused_with_both_affines(tmp_path):
    write_raw_case(tmp_path, "C")
    nibabel.save(nibabel.Nifti1Image(np.zeros((44, 48, 40), np.uint8), np.eye(4)), tmp_path / "p.nii.gz")
    with pytest.raises(InputError, match=r"\[1 0 0 0; .*\[-1 0 0 0; 0 -1 0 239"):
        read_prediction(tmp_path / "p.nii.gz", open_scene(tmp_path / "C"))


def test_a_probability_map_as_prediction_is_refused(tmp_path):
    _, _, label = write_raw_case(tmp_path, "C")
    nibabel.save(nibabel.Nifti1Image(np.float32(0.97) * (label > 0), LPS), tmp_path / "p.nii.gz")
    result = run_script(SCRIPT, "C", "--prediction", "p.nii.gz", "--save", "a.png", cwd=tmp_path, status=2)
    assert len(result.stderr.strip().splitlines()) == 1 and "Give a label map" in result.stderr
    assert not (tmp_path / "a.png").exists()


def test_a_preprocessed_case_opens(tensors, tmp_path):
    run_script(SCRIPT, tensors / "BraTS2021_00003.pt", "--save", "a.png", cwd=tmp_path)
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_a_case_without_segmentation_opens(tmp_path):
    folder, _, _ = write_raw_case(tmp_path, "C")
    (folder / "C_seg.nii.gz").unlink()
    viewer = Viewer(new_figure(with_window=False), open_scene(tmp_path))
    key(viewer, "t")
    key(viewer, "m")
    assert "no segmentation" in viewer.legend_text.get_text()


def test_saving_needs_no_display_and_a_window_does(tmp_path):
    write_raw_case(tmp_path, "C")
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(ROOT / "view_interactive_4pane_brats.py"), "C"]
    saved = subprocess.run([*command, "--save", "a.png"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert saved.returncode == 0 and (tmp_path / "a.png").exists()
    if sys.platform == "linux":
        for backend in ({}, {"MPLBACKEND": "TkAgg"}, {"MPLBACKEND": "svg"}):
            refused = subprocess.run(command, cwd=tmp_path, env=environment | backend, capture_output=True, text=True)
            assert refused.returncode == 2 and "--save" in refused.stderr and "Traceback" not in refused.stderr


def test_who_looks_at_a_raw_case_does_not_wait_for_torch(tmp_path):
    write_raw_case(tmp_path, "C")
    code = ("import sys, view_interactive_4pane_brats as view\n"
            "sys.argv = ['view', 'C', '--save', 'a.png']\n"
            "view.main()\n"
            "assert 'torch' not in sys.modules")  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


def test_bad_arguments_are_refused_in_one_line(tmp_path, tensors):
    write_raw_case(tmp_path, "C")
    for bad in (["C", "--save", "nowhere/a.png"], ["C", "--save", "a.jpg"], ["C", "--save", "a.png", "--slice", 99],
                ["C", "--name", "D", "--save", "a.png"], ["nowhere", "--save", "a.png"], ["x.pt", "--save", "a.png"]):
        result = run_script(SCRIPT, *bad, cwd=tmp_path, status=2)
        assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "a.png").exists()


# ---- both label maps at once ---------------------------------------------------------------------------------------


def test_the_truth_is_an_outline_over_the_filled_prediction(viewer):
    """Two boxes as prediction, one of them beside the truth: filled with the opacity, and around the truth a line."""
    truth = np.zeros(viewer.scene.image.shape[1:], np.uint8)
    truth[10:20, 10:20, 18:22] = 2
    prediction = np.zeros_like(truth)
    prediction[24:30, 24:30, 18:22] = prediction[20:24, 10:20, 18:22] = 1
    viewer.scene.maps = {"truth": truth, "prediction": prediction}
    viewer.show_maps(viewer.scene)
    viewer.go_to(20)
    alpha = np.array(viewer.overlays[0].get_array())[..., 3]
    assert (alpha == 128).sum() == 4 * (6 * 6 + 4 * 10)  # a voxel is 2 x 2 pixels
    assert (alpha == 255).sum() == 20**2 - 18**2
    key(viewer, "c")
    alpha = np.array(viewer.overlays[0].get_array())[..., 3]
    assert (alpha == 128).sum() == 6 * 6 + 4 * 10 and (alpha == 255).sum() == 0
    assert "outline" not in viewer.legend_text.get_text()


def test_the_overlay_lies_where_the_label_is(viewer):
    """Two labelled voxels apart in every axis: their boxes in mm come from the index alone."""
    label = np.zeros(viewer.scene.image.shape[1:], np.uint8)  # [44, 48, 40] RAS at 1 mm
    label[5, 7, 9] = label[30, 41, 33] = 3
    viewer.scene.maps = {"truth": label}
    viewer.show_maps(viewer.scene)
    mirrored, posterior, inferior = (43 - 30, 43 - 5 + 1), (7, 42), (9, 34)
    for plane, extent in (("1", mirrored + posterior), ("2", mirrored + inferior), ("3", posterior + inferior)):
        key(viewer, plane)
        assert tuple(viewer.overlays[0].get_extent()) == extent


# ---- pictures and lines straight to the pixels ---------------------------------------------------------------------


@pytest.fixture
def axes():
    """Axes of 300 x 200 pixels with y upwards, in the middle of a black figure of 400 x 300."""
    figure = Figure(figsize=(4, 3), facecolor="black")
    FigureCanvasAgg(figure)
    return figure.add_axes((0.125, 1 / 6, 0.75, 2 / 3), xticks=[], yticks=[], frame_on=False)


def drawn(axes):
    """The pixels of the figure, and the data coordinates of the middle of each pixel."""
    axes.figure.canvas.draw()
    pixels = np.array(axes.figure.canvas.buffer_rgba())[::-1, :, :3]
    columns, rows = np.meshgrid(np.arange(pixels.shape[1]) + 0.5, np.arange(pixels.shape[0]) + 0.5)
    middles = axes.transData.inverted().transform(np.stack([columns.ravel(), rows.ravel()], 1))
    return pixels, *middles.T.reshape(2, *columns.shape)


@pytest.mark.parametrize("limits", [(-3, 40, -5, 33), (11.3, 17.9, 8.2, 12.1), (50, 60, 0, 10)])
def test_each_pixel_has_the_colour_of_the_voxel_it_lies_on(axes, limits):
    """Voxels of 1.7 mm x 3.1 mm, seen whole, magnified, and from where there is none."""
    colours = np.random.default_rng(0).integers(1, 256, (9, 20, 4), np.uint8)
    colours[..., 3] = 255
    picture = axes.add_artist(SlicePicture(axes, extent=(2, 36, 1, 28.9)))
    picture.set_data(colours)
    axes.set(xlim=limits[:2], ylim=limits[2:])
    pixels, x, y = drawn(axes)
    row, column = np.floor((28.9 - y) / 3.1).astype(int), np.floor((x - 2) / 1.7).astype(int)
    pixel_mm = np.diff(x[0])[0], np.diff(y[:, 0])[0]  # a pixel on the border of the picture may be left out
    well_inside = (x - 2 > pixel_mm[0]) & (36 - x > pixel_mm[0]) & (y - 1 > pixel_mm[1]) & (28.9 - y > pixel_mm[1])
    seen = (x > limits[0]) & (x < limits[1]) & (y > limits[2]) & (y < limits[3])
    inside = well_inside & seen
    assert np.array_equal(pixels[inside], colours[row[inside], column[inside], :3])
    outside = (x < 2) | (x > 36) | (y < 1) | (y > 28.9) | ~seen
    assert not pixels[outside].any()


def test_grey_levels_are_interpolated_within_the_window(axes):
    """A ramp of 20 intensities per voxel, shown from 100 to 355: one grey level per intensity."""
    picture = axes.add_artist(SlicePicture(axes, extent=(0, 30, 0, 20)))
    picture.set_data(np.tile(np.arange(0, 600, 20, dtype=np.int16), (20, 1)))
    picture.set_clim(100, 355)
    axes.set(xlim=(0, 30), ylim=(0, 20))
    pixels, x, y = drawn(axes)
    inside = (x > 0.5) & (x < 29.5) & (y > 0.5) & (y < 19.5)
    expected = np.clip((x - 0.5) * 20 - 100, 0, 255)  # voxel 0 has its middle at 0.5
    assert np.abs(pixels[..., 0] - expected)[inside].max() < 6  # under a third of the step from voxel to voxel
    assert (np.ptp(pixels, axis=2) == 0).all()


@pytest.mark.parametrize("va", ["top", "bottom"])
def test_a_line_stands_where_a_text_of_matplotlib_would(axes, va):
    ink = {}
    for kind in (Text, Line):
        words = axes.add_artist(kind(0.5, 0.5, "voxel (15, 30, 20)", ha="center", va=va, color="#c0ffee", fontsize=11))
        pixels, _, _ = drawn(axes)
        rows, columns = np.nonzero(pixels[..., 1] > 100)
        ink[kind] = np.array([rows.min(), rows.max(), columns.min(), columns.max()])
        assert tuple(pixels.reshape(-1, 3).max(0)) == (0xC0, 0xFF, 0xEE)
        words.remove()
    assert np.abs(ink[Text] - ink[Line]).max() <= 3


def test_a_large_volume_is_shown_in_the_window_of_all_its_voxels():
    volume = np.random.default_rng(0).gamma(4, 200, (160, 150, 140)).astype(np.int16)
    volume[:60] = 0
    exact = np.percentile(volume[volume != 0], (1, 99.5))
    assert intensity_window(volume) == pytest.approx(exact, rel=0.02)


# ---- fast redrawing ------------------------------------------------------------------------------------------------


def pixels(viewer):
    return np.array(viewer.figure.canvas.buffer_rgba())


@pytest.mark.parametrize("keys", [["up"], ["up", "3"], ["o", "down"], ["]", "pagedown"]])
def test_a_partial_redraw_shows_what_a_full_one_does(viewer, keys):
    viewer.figure.canvas.draw()
    for name in keys:
        key(viewer, name)
    viewer.say("news")
    partially = pixels(viewer)
    viewer.figure.canvas.draw()
    assert np.array_equal(partially, pixels(viewer))


def test_a_step_draws_the_slice_without_drawing_all(viewer):
    before, draws = pixels(viewer), []
    viewer.figure.canvas.mpl_connect("draw_event", draws.append)
    scroll(viewer, "up")
    assert not draws
    assert not np.array_equal(before, pixels(viewer))


def test_it_redraws_after_a_change_of_size_and_saves_what_is_shown(viewer, tmp_path):
    viewer.figure.set_size_inches(8, 9)
    viewer.figure.canvas.draw()
    scroll(viewer, "up")
    assert pixels(viewer).shape == (900, 800, 4)
    viewer.say("old news")
    viewer.save(tmp_path / "a.png")
    viewer.figure.canvas.draw()
    assert np.array_equal((imread(tmp_path / "a.png") * 255).round(), pixels(viewer))
    viewer.save(tmp_path / "a.png")
    viewer.say("news")  # what was saved must not have become what is kept below the words
    partially = pixels(viewer)
    viewer.figure.canvas.draw()
    assert np.array_equal(partially, pixels(viewer))


def test_the_words_fit_a_small_window(viewer):
    figure = viewer.figure
    figure.set_size_inches(6, 6)
    figure.canvas.callbacks.process("resize_event", ResizeEvent("resize_event", figure.canvas))
    figure.canvas.draw()
    for words in (figure.legends[0], viewer.legend_text, viewer.status, viewer.title):
        box = words.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= 600 and box.y0 >= 0 and box.y1 <= 600
    assert viewer.convention.get_window_extent().y0 > viewer.panes[0].axes.title.get_window_extent().y1


def test_a_canvas_that_cannot_copy_regions_draws_all(tmp_path):
    write_raw_case(tmp_path, "C")
    figure = new_figure(with_window=False)
    figure.canvas.supports_blit = False
    viewer = Viewer(figure, open_scene(tmp_path))
    before = pixels(viewer)
    scroll(viewer, "up")
    assert not np.array_equal(before, pixels(viewer))


def test_a_closing_window_still_takes_what_comes_late(viewer):
    """Closing takes the canvas away from the figure before the last events arrive."""
    viewer.figure.canvas.draw()
    index = viewer.index
    FigureCanvasBase(viewer.figure)
    viewer.say("late")
    scroll(viewer, "up")
    assert viewer.index == index + 1
