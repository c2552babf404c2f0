"""The published Swin UNETR weights as a run, against MONAI's parts put together as their test script has them."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from conftest import run_script, write_raw_case
from monai.inferers import sliding_window_inference
from monai.transforms import Compose, ConcatItemsd, LoadImaged, NormalizeIntensityd
from test_swinunetr import TINY, merge_as_before_1_5, pair

from models import build_model
from models.cases import find_cases
from models.errors import InputError
from models.inference.predict import Member, member_of, predict_all, segment
from models.preprocessing import label_map, to_native, to_network
from models.runs import checkpoint_of, choose_folder, load_model, open_run
from models.swinunetr.import_weights import IMAGE_LAYERS, import_run, load_published
from models.swinunetr.network import SwinUNETR
from models.volumes import read_case

PUBLISHED = ("flair", "t1ce", "t1", "t2")
COMMAND = ("-m", "models.swinunetr.import_weights")
WINDOW = [32, 32, 64]


def save_as_published(path, network):
    """A checkpoint as the published trainer writes it: its best score is a numpy scalar, here of numpy 1."""
    content = io.BytesIO()
    torch.save({"epoch": 299, "best_acc": np.float32(0.9), "state_dict": network.state_dict()}, content)
    with zipfile.ZipFile(content) as new, zipfile.ZipFile(path, "w") as old:
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


@pytest.fixture(scope="module")
def published():
    """MONAI's network of three regions, with the patch merging of its day and weights of random numbers."""
    network, _ = pair(out_channels=3)
    merge_as_before_1_5(network)
    return network


@pytest.fixture(scope="module")
def imported(published, tmp_path_factory):
    """The folder of its run, made by the command."""
    folder = tmp_path_factory.mktemp("imported")
    save_as_published(folder / "model.pt", published)
    result = run_script(*COMMAND, "model.pt", "--run-name", "fold", cwd=folder)
    assert "models/swinunetr/results/fold" in result.stdout
    return folder / "models/swinunetr/results/fold"


# ---- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [True, False])
def test_imported_weights_see_our_channel_order(tmp_path, wrapped):
    theirs, _ = pair(out_channels=3)
    merge_as_before_1_5(theirs)
    state = theirs.state_dict()
    torch.save({"state_dict": state} if wrapped else {f"module.{k}": v for k, v in state.items()}, tmp_path / "fold.pt")
    ours, _ = load_published(tmp_path / "fold.pt")
    t1, t1ce, t2, flair = torch.randn(4, 1, 32, 64, 32)
    with torch.inference_mode():
        expected = theirs(torch.stack([flair, t1ce, t1, t2], 1))
        assert (ours(torch.stack([t1, t1ce, t2, flair], 1)) - expected).abs().max() < 1e-4
    # no other parameter has an input channel for each modality
    fresh = SwinUNETR(**TINY).state_dict()
    assert {name for name, weight in fresh.items() if weight.dim() == 5 and weight.shape[1] == 4} - {
        "out.conv.conv.weight"
    } == set(IMAGE_LAYERS)


def test_other_weights_are_refused(tmp_path):
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "other.pt")
    torch.save(checkpoint_of(build_model("unet"), "off", 1, 0.5), tmp_path / "unet.pt")
    for name in ("text.pt", "other.pt", "unet.pt", "missing.pt"):
        with pytest.raises(InputError, match=name):
            load_published(tmp_path / name)


# ---- a run ---------------------------------------------------------------------------------------------------------


def test_a_fold_becomes_a_run_with_its_recipe(imported):
    run = open_run(imported)
    assert (run.network, run.size, run.epoch, run.amp) == ("swinunetr", [128, 128, 128], 300, "off")
    assert run.config["out_channels"] == 3 and run.config["feature_size"] == 12 and run.config["legacy_merging"]
    assert run.preprocessing == {"size": None, "spacing_mm": 1.0, "normalize": "zscore", "crop": False}
    assert run.split is None and run.data is None  # nothing is known of what it was trained on
    assert member_of(run, None) == Member(None, None, (128, 128, 128), 0.7, "constant", (1, 2))
    source = json.loads((imported / "config.json").read_text())["imported_from"]
    assert source["file"] == "model.pt" and len(source["sha256"]) == 64


@pytest.mark.parametrize("shape", [(40, 36, 70), (26, 36, 70)])  # larger than the window; along one axis smaller
def test_a_raw_case_is_predicted_as_with_monais_parts(imported, published, tmp_path, shape):
    """In smaller windows, for speed; the file has LPS axes, as those of BraTS 2021."""
    folder, _, _ = write_raw_case(tmp_path, "C", shape=shape)
    record = json.loads((imported / "config.json").read_text())
    (tmp_path / "best.pt").write_bytes((imported / "best.pt").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(record | {"size": WINDOW}))

    files = {modality: folder / f"C_{modality}.nii.gz" for modality in PUBLISHED}
    image = Compose([
        LoadImaged(PUBLISHED, ensure_channel_first=True, image_only=True),
        ConcatItemsd(PUBLISHED, "image"),
        NormalizeIntensityd("image", nonzero=True, channel_wise=True),
    ])(files)["image"].as_tensor()  # fmt: skip
    with torch.inference_mode():
        expected = torch.sigmoid(sliding_window_inference(image[None], WINDOW, 1, published, overlap=0.7))[0]

    run, raw = open_run(tmp_path), read_case(find_cases(folder)[0])
    network, _ = load_model(tmp_path)
    case = to_network(raw.image, None, raw.affine, **run.preprocessing)
    probabilities, _ = predict_all([member_of(run, network)], case["image"])
    actual = to_native(probabilities, case["geometry"])  # [3, X, Y, Z]
    assert (actual - expected).abs().max() < 1e-3
    tc, wt, et = (expected > 0.5).numpy()
    labels = np.where(et, 3, np.where(tc, 1, np.where(wt, 2, 0)))
    label = segment(raw.image, raw.affine, member_of(run, network), run.preprocessing, torch.device("cpu"))
    assert (label == labels).mean() > 0.999 and np.array_equal(label, label_map(actual))
    assert len(np.unique(labels)) == 4


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_a_run_is_not_overwritten(imported):
    before = (imported / "best.pt").read_bytes()
    result = run_script(*COMMAND, "model.pt", "--run-name", "fold", cwd=imported.parents[3], status=2)
    assert "already holds a run. Choose another --run-name." in result.stderr and len(result.stderr.splitlines()) == 1
    assert (imported / "best.pt").read_bytes() == before


def test_weights_of_labels_do_not_fit_the_recipe(tmp_path):
    of_labels, _ = pair(out_channels=4)
    save_as_published(tmp_path / "labels.pt", of_labels)
    with pytest.raises(InputError, match=r"labels\.pt: has 4 outputs, but the published folds have 3"):
        import_run(tmp_path / "labels.pt", "never-written")
    assert not choose_folder("swinunetr", "never-written").exists()
