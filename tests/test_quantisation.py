"""int8: labels like those of float32 on cases that it was not calibrated with, and refusal where they are not or where
no cases are there to calibrate it."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import LPS, make_head

from models import build_model
from models.benchmark import worker
from models.benchmark.worker import Job, Model
from models.brats import LABELS, MODALITIES
from models.errors import InputError
from models.inference import engines, quantisation
from models.inference.availability import why_not
from models.inference.engines import choose_engine, engine_name, load_engine
from models.inference.quantisation import as_input, calibration_images, refuse_other_labels
from models.losses import make_loss
from models.preprocessing import to_network
from models.runs import checkpoint_of, load_model, open_run
from models.tensors import load_case, save_case

CPU = torch.device("cpu")
SHAPE = (1, 4, 32, 32, 32)
SPLIT = {"train": ["a", "b", "c", "d"], "validation": ["e"], "test": ["f", "g"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A U-Net that has learnt something, as a training script leaves it, and its cases."""
    data, folder = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("runs")
    for seed, name in enumerate("abcdefg"):
        volumes, label = make_head(seed)
        case = to_network(np.stack([volumes[modality] for modality in MODALITIES]), label, LPS, 32)
        about = {"case": name, "modalities": list(MODALITIES), "label_scheme": "brats2021"}
        save_case(data / f"{name}.pt", case | about, compact=True)
    torch.manual_seed(0)
    model, loss = build_model("unet"), make_loss()
    cases = [load_case(data / f"{name}.pt") for name in SPLIT["train"]]
    images, labels = (torch.stack([case[key] for case in cases]) for key in ("image", "label"))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(20):
        loss(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(checkpoint_of(model, "off", 1, None), folder / "best.pt")
    record = {"size": [32, 32, 32], "spacing_mm": 1.0, "split": SPLIT, "arguments": {"data": str(data)}}
    (folder / "config.json").write_text(json.dumps(record))
    return open_run(folder)


@pytest.fixture(scope="module")
def unet(run):
    return load_model(run.folder)[0]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


def load(model, calibration, cache):
    if reason := why_not("openvino", "int8", CPU, model):
        pytest.skip(reason)
    return load_engine(model, "openvino", "int8", shape=SHAPE, cache=cache, calibration=calibration)


@pytest.fixture(scope="module")
def engine(unet, run, cache):
    return load(unet, calibration_images(run), cache)


def copy_of_the_export(cache, folder):
    """It takes seconds to make."""
    (exported,) = cache.glob("*.onnx")
    shutil.copy(exported, folder)


# ---- the same labels -----------------------------------------------------------------------------------------------


def test_int8_labels_like_the_network_on_cases_that_it_was_not_calibrated_with(unet, run, engine):
    images = torch.stack([load_case(run.data / f"{name}.pt")["image"] for name in SPLIT["validation"] + SPLIT["test"]])
    with torch.no_grad():
        expected = unet(images).argmax(1)
    labels = torch.cat([engine(image[None]).argmax(1) for image in images])
    tumour = (expected > 0) | (labels > 0)
    assert (labels == expected).float().mean() >= 0.99
    assert 0.01 < tumour.float().mean() < 0.5 and (labels == expected)[tumour].float().mean() >= 0.95


def test_every_convolution_multiplies_8_bits(engine, cache):
    import openvino

    (path,) = cache.glob("*.xml")
    operations = openvino.Core().read_model(path).get_ordered_ops()
    convolutions = [one for one in operations if one.get_type_name().startswith("Convolution")]
    images, weights = ({one.input_value(place).get_node() for one in convolutions} for place in (0, 1))
    joined = {source.get_node() for one in images if one.get_type_name() == "Concat" for source in one.input_values()}
    rounded = [one.get_type_name() for one in images | joined if one.get_type_name() != "Concat"]
    assert len(convolutions) > 20 and set(rounded) == {"FakeQuantize"}
    stored = {one.input_value(0).get_node().input_value(0).get_element_type() for one in weights}  # before the scale
    assert stored == {openvino.Type.i8}


@pytest.mark.slow
def test_a_network_with_attention_is_quantised_too(tmp_path, monkeypatch):
    """Random weights decide for no label, so the logits are compared."""
    torch.manual_seed(0)
    swin = build_model("swinunetr", feature_size=12, depths=(1, 1, 1, 1)).eval()
    monkeypatch.setattr(quantisation, "AGREEMENT", 0)
    monkeypatch.setattr(quantisation, "TUMOUR_AGREEMENT", 0)
    image = torch.rand(SHAPE)
    logits = load(swin, [image[0]], tmp_path)(image)
    with torch.no_grad():
        expected = swin(image)
    assert (logits - expected).std() < 0.05 * expected.std()


def test_nothing_is_printed_to_stdout(unet, run, tmp_path, engine, cache, capfd):
    copy_of_the_export(cache, tmp_path)
    load(unet, calibration_images(run)[:1], tmp_path)
    printed = capfd.readouterr()
    assert printed.out == "" and "with 1 training case ..." in printed.err


# ---- the files -----------------------------------------------------------------------------------------------------


def test_it_is_made_once_for_these_weights_and_this_calibration(unet, run, engine, cache, monkeypatch):
    def quantises(*_):
        raise RuntimeError("quantises again")

    def exports(prepared, image, path, *_):
        if not path.is_file():
            raise RuntimeError("exports again")

    monkeypatch.setattr(quantisation, "_write_int8", quantises)
    monkeypatch.setattr(engines, "export_to_onnx", exports)
    images = calibration_images(run)
    image = as_input(images[0], SHAPE)
    torch.testing.assert_close(load(unet, images, cache)(image), engine(image))
    with pytest.raises(RuntimeError, match="quantises again"):
        load(unet, images[:3], cache)
    other = load_model(run.folder)[0]
    with torch.no_grad():
        next(other.parameters())[0] += 1e-3
    with pytest.raises(RuntimeError, match="exports again"):
        load(other, images, cache)


def test_labels_that_change_too_much_are_refused_and_leave_no_file(unet, run, tmp_path, engine, cache, monkeypatch):
    copy_of_the_export(cache, tmp_path)
    monkeypatch.setattr(quantisation, "AGREEMENT", 1.01)
    with pytest.raises(InputError, match=r"in int8 the network gives \d+\.\d\d% of the voxels the label"):
        load(unet, calibration_images(run)[:1], tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".onnx"]


def test_a_network_that_loses_a_small_tumour_is_refused():
    """It labels 511 of 512 voxels like the other."""
    truth = torch.zeros(1, 4, 8, 8, 8)
    truth[:, 0] = 1
    truth[:, 2, 4, 4, 4] = 2
    without = truth.clone()
    without[:, 2] = 0
    with pytest.raises(InputError, match=r"99\.80% of the voxels .* and 0\.00% of those in the tumour"):
        refuse_other_labels(lambda image: without, lambda image: truth, [None])
    refuse_other_labels(lambda image: truth, lambda image: truth, [None])
    refuse_other_labels(lambda image: without, lambda image: without, [None])  # neither sees a tumour


# ---- the calibration -----------------------------------------------------------------------------------------------


def test_without_a_calibration_int8_is_refused_and_not_replaced(unet, engine, cache):
    with pytest.raises(InputError, match="int8 cannot be calibrated: that takes a run"):
        load(unet, (), cache)


def test_the_calibration_is_spread_over_the_training_cases(run, tmp_path):
    names = [f"case{index:02}" for index in range(45)]
    for index, name in enumerate(names):
        os.link(run.data / f"{SPLIT['train'][index % 4]}.pt", tmp_path / f"{name}.pt")
    images = calibration_images(replace(run, data=tmp_path, split={"train": names}))
    assert len(images) == 15 and images[0].dtype == torch.float16  # as they are stored
    for index, image in enumerate(images):  # every third
        assert torch.equal(image.float(), load_case(tmp_path / f"case{3 * index:02}.pt")["image"])


def test_training_cases_that_are_gone_or_unknown_are_named(run, tmp_path):
    with pytest.raises(InputError, match=r"training cases of .*a\.pt: no such file"):
        calibration_images(replace(run, data=tmp_path))
    with pytest.raises(InputError, match=r"config\.json names no training cases"):
        calibration_images(replace(run, split=None))


@pytest.mark.parametrize(("sides", "taken", "padding"), [
    ((6, 6, 6), (slice(None),) * 3, 0),
    ((9, 6, 8), (slice(2, 8), slice(None), slice(1, 7)), 0),
    ((4, 6, 6), (slice(None),) * 3, ((0, 0), (1, 1), (0, 0), (0, 0))),
])  # fmt: skip
def test_an_image_of_another_size_is_cropped_to_its_middle_or_padded(sides, taken, padding):
    image = np.random.default_rng(0).random((4, *sides)).astype(np.float16)
    expected = np.pad(image[:, *taken], padding).astype(np.float32)
    batch = as_input(torch.from_numpy(image), (2, 4, 6, 6, 6))
    assert batch.dtype == torch.float32 and np.array_equal(batch.numpy(), np.stack([expected] * 2))


# ---- who uses it ---------------------------------------------------------------------------------------------------


def test_the_engine_of_that_name_is_calibrated_with_the_cases_of_the_run(unet, run, engine, cache):
    chosen = choose_engine(unet, "openvino-int8", torch.bfloat16, 32, CPU, 1, cache, run=run)
    image = as_input(calibration_images(run)[0], SHAPE)
    assert engine_name(chosen) == "openvino-int8" and torch.equal(chosen(image), engine(image))


def test_the_benchmark_measures_the_dice_of_int8(run, engine, cache):
    """Not that of the network as it was trained; the mean over labels and test cases, counted by numpy."""
    model = Model("unet-run", "unet", run.config, str(run.folder), dice=0.123)
    job = Job(model=model, engine="openvino", dtype="int8", layout="auto", batch=1, size=32, device="cpu", parameters=1,
              macs=1, values=1, repeats=5, max_seconds=10, cache=str(cache))  # fmt: skip
    dice = []
    for name in SPLIT["test"]:
        case = load_case(run.data / f"{name}.pt")
        label, truth = engine(case["image"][None])[0].argmax(0).numpy(), case["label"][0].numpy()
        for value in LABELS:
            true, predicted = truth == value, label == value
            dice.append(2 * (true & predicted).sum() / (true.sum() + predicted.sum()))
    result = worker.measure_row(job)
    assert result.dice == pytest.approx(np.mean(dice)) and result.label_agreement >= 0.99
