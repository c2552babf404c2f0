"""Going through cases in the viewer, and segmenting them in its thread, without a display."""

import json
import threading
import time
from dataclasses import fields, replace
from functools import partial

import nibabel
import numpy as np
import pytest
import torch
from conftest import LPS, run_script, write_raw_case
from test_viewer import SCRIPT, key, open_scene, scroll

from models import build_model
from models.cases import find_cases
from models.errors import InputError
from models.inference.predict import predict
from models.metrics import confusion, dice_per_target
from models.nifti import to_ras
from models.preprocessing import to_native, to_network
from models.runs import Run, checkpoint_of
from models.viewer.scene import find_scenes, load_tensor
from models.viewer.segmentation import Segmenter, load_segmenter, segment_scene, with_engine
from models.viewer.session import Session
from models.viewer.window import Viewer, new_figure
from models.volumes import read_case

# ---- from case to case ---------------------------------------------------------------------------------------------


def wait_for(session):
    """What the window's timer does, until the thread has nothing more to do."""
    end = time.monotonic() + 60
    while session.future and time.monotonic() < end:
        session.poll()
        time.sleep(0.01)
    assert session.future is None


def open_session(folder, segmenter=None, name=None):
    loaders = find_scenes(folder, None)
    viewer = Viewer(new_figure(with_window=False), loaders[name or next(iter(loaders))]())
    return Session(viewer, loaders, segmenter and partial(segment_scene, segmenter))


def test_n_and_b_go_through_a_folder_and_stop_at_its_ends(tmp_path):
    for index in range(3):
        write_raw_case(tmp_path, f"C{index}", seed=index)
    session = open_session(tmp_path, name="C1")
    viewer = session.viewer
    assert "C1 (case 2 of 3)" in viewer.title.get_text()
    key(viewer, "2")
    key(viewer, "n")
    wait_for(session)
    assert "C2 (case 3 of 3)" in viewer.title.get_text() and "coronal" in viewer.title.get_text()
    t1 = nibabel.load(tmp_path / "C2/C2_t1.nii.gz")
    assert np.array_equal(viewer.scene.image[0], to_ras(t1.get_fdata()[None], t1.affine)[0])
    key(viewer, "n")
    assert "last of 3" in viewer.note.get_text() and viewer.scene.name == "C2"
    for _ in range(2):
        key(viewer, "b")
    wait_for(session)
    assert viewer.scene.name == "C0"
    key(viewer, "b")
    assert "first of 3" in viewer.note.get_text() and viewer.scene.name == "C0"


def test_a_folder_of_tensors_is_gone_through_in_order(tensors):
    session = open_session(tensors)
    assert session.names == [f"BraTS2021_{index:05d}" for index in range(12)]
    key(session.viewer, "n")
    wait_for(session)
    stored = torch.load(tensors / "BraTS2021_00001.pt", weights_only=True)["image"]
    assert np.array_equal(session.viewer.scene.image, stored.numpy())


def test_a_case_that_cannot_be_read_is_named_and_passed(tmp_path, capsys):
    for index in range(3):
        write_raw_case(tmp_path, f"C{index}", seed=index)
    (tmp_path / "C1/C1_t2.nii.gz").write_bytes(b"not a NIfTI file")
    session = open_session(tmp_path)
    key(session.viewer, "n")
    wait_for(session)
    assert "C1_t2.nii.gz" in session.viewer.note.get_text()
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    key(session.viewer, "n")
    wait_for(session)
    assert session.viewer.scene.name == "C2" and "C1" not in session.viewer.note.get_text()


# ---- live segmentation ---------------------------------------------------------------------------------------------


class BrightT1ce(torch.nn.Module):
    """ET where T1CE is above 0.7, ED where FLAIR is above 0.7 otherwise: each voxel on its own."""

    def forward(self, image):  # [B, 4, D, H, W]
        enhancing, oedema = image[:, 1] > 0.7, (image[:, 3] > 0.7) & ~(image[:, 1] > 0.7)
        none = torch.zeros_like(enhancing)
        return 20.0 * torch.stack([~(enhancing | oedema), none, oedema, enhancing], 1)


def segmenter_of(network, size=32, spacing_mm=1.0):
    unknown = dict.fromkeys(field.name for field in fields(Run))
    preprocessing = {"size": size, "spacing_mm": spacing_mm, "normalize": "percentile"}
    run = Run(**unknown | {"name": "stub", "size": [size] * 3, "preprocessing": preprocessing, "inference": {}})
    return Segmenter(run, network, torch.device("cpu"), None)


@pytest.mark.parametrize("affine", [LPS, np.array([[0, 0, 1.5, 3], [-2, 0, 0, 5], [0, 1, 0, 7], [0, 0, 0, 1.0]])])
def test_a_raw_case_is_predicted_on_its_own_grid(tmp_path, affine):
    """The oracle goes through the file's own axes, as evaluate.py does, and turns the result at the end."""
    _, _, label = write_raw_case(tmp_path, "C", affine=affine)
    segmented = segment_scene(segmenter_of(BrightT1ce(), 32, 1.25), open_scene(tmp_path))
    volumes = read_case(find_cases(tmp_path)[0])
    case = to_network(volumes.image, None, volumes.affine, 32, 1.25)
    native = to_native(predict(BrightT1ce(), case["image"]), case["geometry"]).argmax(0)  # [X, Y, Z]
    assert set(native.unique().tolist()) == {0, 2, 3}
    assert np.array_equal(segmented.maps["prediction"], to_ras(native.numpy()[None], affine)[0])
    dice = dice_per_target(confusion(native, torch.from_numpy(label)))
    assert all(f"{region} {dice[region]:.3f}" in segmented.scores for region in ("WT", "TC", "ET"))


def test_a_tensor_is_predicted_as_it_is(tensors):
    path = tensors / "BraTS2021_00003.pt"
    segmented = segment_scene(segmenter_of(BrightT1ce()), load_tensor(path))
    image = torch.load(path, weights_only=True)["image"].numpy()
    expected = np.where(image[1] > 0.7, 3, np.where(image[3] > 0.7, 2, 0))
    assert np.array_equal(segmented.maps["prediction"], expected)
    with pytest.raises(InputError, match="--size 64"):
        segment_scene(segmenter_of(BrightT1ce(), size=64), load_tensor(path))


def test_a_run_on_native_cases_predicts_a_tensor_of_any_size_in_its_windows(tensors):
    scene, windows = load_tensor(tensors / "BraTS2021_00003.pt"), set()  # 32 x 32 x 32
    segmenter = segmenter_of(BrightT1ce())
    segmenter.network.register_forward_pre_hook(lambda _, inputs: windows.add(tuple(inputs[0].shape[2:])))
    of_patches = replace(segmenter.run, size=[16, 16, 16], preprocessing=segmenter.run.preprocessing | {"size": None})
    segmented = segment_scene(replace(segmenter, run=of_patches), scene)
    expected = segment_scene(segmenter_of(BrightT1ce()), scene)
    assert windows == {(16, 16, 16)}
    assert np.array_equal(segmented.maps["prediction"], expected.maps["prediction"])


def test_a_run_on_whole_files_predicts_no_cropped_tensor(tensors):
    segmenter = segmenter_of(BrightT1ce())
    of_files = replace(segmenter.run, preprocessing=segmenter.run.preprocessing | {"size": None, "crop": False})
    with pytest.raises(InputError, match="stub predicts whole files"):
        segment_scene(replace(segmenter, run=of_files), load_tensor(tensors / "BraTS2021_00003.pt"))


class Held(BrightT1ce):
    """Goes on when it is let."""

    def __init__(self):
        super().__init__()
        self.entered, self.go_on, self.finished = threading.Event(), threading.Event(), []
        self.last = torch.nn.Identity()

    def forward(self, image):
        self.entered.set()
        assert self.go_on.wait(60)
        result = self.last(super().forward(image))
        self.finished.append(True)
        return result


def test_the_window_answers_while_the_network_works(tmp_path):
    write_raw_case(tmp_path, "C")
    model = Held()
    session = open_session(tmp_path, segmenter_of(model))
    viewer = session.viewer
    assert model.entered.wait(60)
    index = viewer.index
    scroll(viewer, "up")
    session.poll()
    assert viewer.index == index + 1
    assert "network" in viewer.note.get_text() and viewer.note.get_text().endswith(" s")
    model.go_on.set()
    wait_for(session)
    assert viewer.index == index + 1  # where the user was
    assert "filled: prediction" in viewer.legend_text.get_text() and "Dice WT" in viewer.legend_text.get_text()
    assert "segmented by stub in" in viewer.note.get_text() and "ms" in viewer.note.get_text()


def test_a_case_without_truth_is_shown_where_its_prediction_is_largest(tmp_path):
    folder, _, _ = write_raw_case(tmp_path, "C")
    (folder / "C_seg.nii.gz").unlink()
    session = open_session(tmp_path, segmenter_of(BrightT1ce()))
    wait_for(session)
    viewer = session.viewer
    assert list(viewer.scene.maps) == ["prediction"] and "Dice" not in viewer.legend_text.get_text()
    assert viewer.index == np.count_nonzero(viewer.scene.maps["prediction"], axis=(0, 1)).argmax()


def test_going_on_abandons_the_work_on_the_case_left_behind(tmp_path):
    for index in range(2):
        write_raw_case(tmp_path, f"C{index}", seed=index)
    model = Held()
    session = open_session(tmp_path, segmenter_of(model))
    assert model.entered.wait(60)
    key(session.viewer, "n")
    model.go_on.set()
    wait_for(session)
    assert session.viewer.scene.name == "C1" and "prediction" in session.viewer.scene.maps
    assert model.finished == [True]  # of the second case alone
    assert not model.last._forward_pre_hooks


def test_an_error_in_the_thread_is_shown_and_the_window_stays(tmp_path, capsys):
    class Broken(torch.nn.Module):
        def forward(self, image):
            raise RuntimeError("out of\nmemory")

    write_raw_case(tmp_path, "C")
    session = open_session(tmp_path, segmenter_of(Broken()))
    wait_for(session)
    assert session.viewer.note.get_text() == "C: RuntimeError: out of memory"
    assert capsys.readouterr().err == "C: RuntimeError: out of memory\n"
    index = session.viewer.index
    scroll(session.viewer, "up")
    assert session.viewer.index == index + 1


def test_closing_the_window_ends_the_work(tmp_path):
    write_raw_case(tmp_path, "C")
    model = Held()
    session = open_session(tmp_path, segmenter_of(model))
    assert model.entered.wait(60)
    session.viewer.figure.canvas.callbacks.process("close_event", None)
    model.go_on.set()
    session.pool.shutdown(wait=True)
    assert model.finished == [] and session.future is None


@pytest.fixture(scope="module")
def run(tensors, tmp_path_factory):
    """A run folder as training leaves it, with a small untrained U-Net for the 32^3 tensors."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    folder.mkdir()
    torch.manual_seed(0)
    model = build_model("unet", channels=(4, 8, 16, 32, 64))
    torch.save(checkpoint_of(model, "off", 1, 0.0), folder / "best.pt")
    (folder / "config.json").write_text(json.dumps({"size": [32, 32, 32], "spacing_mm": 2.0}))
    return folder


def test_a_run_is_opened_with_the_size_and_spacing_of_its_cases(run, tmp_path):
    opened = load_segmenter(run / "best.pt", "cpu", "off").run
    assert (opened.name, opened.size) == ("small", [32, 32, 32])
    assert opened.preprocessing == {"size": 32, "spacing_mm": 2.0, "normalize": "percentile"}
    (tmp_path / "best.pt").write_bytes((run / "best.pt").read_bytes())
    with pytest.raises(InputError, match="does not say how the cases"):
        load_segmenter(tmp_path, "cpu", "off")


def test_an_engine_segments_like_the_network(run, tmp_path, monkeypatch):
    write_raw_case(tmp_path, "C")
    by_network = load_segmenter(run, "cpu", "off")
    stages = []
    monkeypatch.chdir(tmp_path)  # where the cache of engines goes
    by_engine = with_engine(by_network, "eager", cases=1)
    assert by_engine.network.engine == "eager"
    segmented = segment_scene(by_engine, open_scene(tmp_path), stages.append)
    expected = segment_scene(by_network, open_scene(tmp_path))
    assert np.mean(segmented.maps["prediction"] == expected.maps["prediction"]) >= 0.999
    assert "segmenting: network" in stages


def test_save_with_a_run_segments_first_and_prints_the_scores(run, tmp_path):
    write_raw_case(tmp_path, "C")
    result = run_script(SCRIPT, "C", "--run", run, "--device", "cpu", "--save", "a.png", cwd=tmp_path)
    assert "Dice WT 0." in result.stdout and "ms (" in result.stdout
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_what_does_not_fit_a_run_is_refused(run, tensors, tmp_path):
    write_raw_case(tmp_path, "C")
    (tmp_path / "other").mkdir()
    described = json.loads((run / "config.json").read_text()) | {"size": [64, 64, 64]}
    (tmp_path / "other/config.json").write_text(json.dumps(described))
    (tmp_path / "other/best.pt").write_bytes((run / "best.pt").read_bytes())
    refuse = partial(run_script, SCRIPT, cwd=tmp_path, status=2)
    for bad, word in ((["C", "--run", "nowhere"], "no such checkpoint"),
                      ([tensors / "BraTS2021_00003.pt", "--run", "other"], "--size 64")):
        result = refuse(*bad, "--save", "a.png")
        assert len(result.stderr.strip().splitlines()) == 1 and word in result.stderr
    both = refuse("C", "--run", run, "--prediction", "C/C_seg.nii.gz", "--save", "a.png")
    assert "not allowed with" in both.stderr
    assert not (tmp_path / "a.png").exists()
