"""The training loop: schedule, accumulation, resuming, learning at all."""

import argparse
import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, copy_of_the_code, run_script

from models import amp, build_model, cli, files, plots, refuse_unfit_size, resuming, runs, training
from models.brats import patient_of
from models.checkpoints import Learner
from models.dataset import Cases, input_size, read_split
from models.device import device_name
from models.errors import InputError
from models.runs import load_model, open_run
from models.tensors import load_case

SMALL = {"channels": (4, 8, 16, 32, 64)}
REGIONS = SMALL | {"out_channels": 3}
CPU = torch.device("cpu")
RUN = Path("models/unet/results/test")
GOLDEN = ROOT / "tests/golden/losses.json"


def arguments(data, *flags):
    parser = argparse.ArgumentParser()
    cli.add_training_arguments(parser)
    # In float32: --amp auto measures, and need not decide the same way twice.
    return parser.parse_args([str(data), "--run-name", "test", "--amp", "off", *map(str, flags)])


def train(data, folder, *flags, split=None, config=SMALL, network="unet"):
    """Train as the scripts do, `folder` in place of the repository; returns the network and the run's folder."""
    args = arguments(data, *flags)
    split = split or read_split(data, args.fold)
    size = input_size(args.data, split, args.patch)
    refuse_unfit_size(network, config, size, data, args.patch)
    training.setup("cpu", args.seed)
    model = build_model(network, **config)
    if args.init and not args.resume:
        runs.load_initial_weights(model, args.init, args.data, split)
    with pytest.MonkeyPatch.context() as patch:
        for module in (runs, files):
            patch.setattr(module, "ROOT", folder)
        run = runs.choose_folder(network, args.run_name)
        with runs.locked(run):
            earlier = resuming.record_to_resume(run, model, vars(args), split)
            settings = cli.settings_of(args, training.Settings)
            settings = training.resolve(settings, model, size, split, CPU, earlier)
            resuming.write_record(run, earlier, model, vars(args) | asdict(settings), split, size, CPU)
            training.fit(model, settings, split, run, CPU, args.resume)
    return model, run


def losses_of(run):
    return [row["train_loss"] for row in csv.DictReader((run / "train.csv").open())]


def test_the_learning_rate_warms_up_falls_like_a_cosine_and_is_never_zero():
    rates = [training.learning_rate(step, 100, 10, 1e-3) for step in range(100)]
    assert min(rates) > 0 and max(rates) == pytest.approx(1e-3)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.5e-3)
    assert training.learning_rate(0, 1, 0, 1e-3) == 1e-3


@pytest.mark.parametrize(("network", "config"), [("unet", SMALL), ("swinunetr", {"feature_size": 12})])
def test_training_starts_with_each_label_as_likely_as_it_is_frequent(tensors, network, config):
    names = read_split(tensors)["train"][:3]
    cases = Cases(tensors, names, "ram", CPU)
    labels = torch.cat([load_case(tensors / f"{name}.pt")["label"].flatten() for name in names])
    model = build_model(network, **config)
    output = [module for module in model.modules() if isinstance(module, torch.nn.Conv3d)][-1]
    torch.nn.init.zeros_(output.bias)
    empty = torch.zeros(1, 4, 32, 32, 32)
    before = model(empty)
    training.start_at_class_frequencies(model, cases)
    change = (model(empty) - before).mean((0, 2, 3, 4)).detach()
    frequencies = torch.tensor([(labels == value).float().mean() for value in range(4)])
    assert torch.allclose(change.softmax(0), frequencies, atol=1e-3)


def one_epoch(data, cases, batch_size, accumulate):
    args = arguments(data, "--batch-size", batch_size, "--accumulate", accumulate, "--epochs", 1, "--warmup", 0,
                     "--flip-probability", 0, "--rotate-probability", 0, "--noise-probability", 0, "--clip", 1e9)
    settings = cli.settings_of(args, training.Settings)
    torch.manual_seed(0)
    model = build_model("unet", **SMALL)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    learner = Learner(model, None, optimizer, torch.amp.GradScaler("cpu", enabled=False), "off")
    training.train_epoch(model, cases, 0, settings, learner, CPU)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_accumulated_steps_equal_one_large_batch_in_the_short_last_window_too(tensors):
    cases = Cases(tensors, read_split(tensors)["train"][:5], "ram", CPU)
    large, accumulated = one_epoch(tensors, cases, 3, 1), one_epoch(tensors, cases, 1, 3)  # windows of 3 and 2
    assert torch.allclose(large, accumulated, atol=2e-5)


@pytest.mark.parametrize(
    "added", [[], ["--patch", 16], ["--ema", 0.9], ["--augmentation", "strong", "--copy-paste", 0.5]]
)
def test_four_epochs_equal_two_and_a_resumed_two_bit_for_bit(tensors, tmp_path, added):
    flags = ["--epochs", 4, "--accumulate", 2, *added]
    config = SMALL | ({"channels": (4, 8, 16), "strides": (2, 2)} if "--patch" in added else {})
    whole, run = train(tensors, tmp_path / "a", *flags, config=config)

    written = training.write_epoch

    def stop_after_two(run, history, *rest):
        written(run, history, *rest)
        if len(history) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "write_epoch", stop_after_two)
        train(tensors, tmp_path / "b", *flags, config=config)
    resumed, again = train(tensors, tmp_path / "b", *flags, "--resume", config=config)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    best, last = ([torch.load(r / file, weights_only=True) for r in (run, again)] for file in ("best.pt", "last.pt"))
    assert best[0]["epoch"] == best[1]["epoch"]
    for a, b in (best, last):
        assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert losses_of(run) == losses_of(again) and len(losses_of(run)) == 4


@pytest.mark.slow
def test_one_case_can_be_learnt_by_heart(tensors, tmp_path):
    name = read_split(tensors)["train"][0]
    split = {"train": [name] * 8, "validation": [name], "test": [name]}
    off = ["--flip-probability", 0, "--rotate-probability", 0, "--noise-probability", 0]
    _, run = train(tensors, tmp_path, "--epochs", 14, "--learning-rate", 5e-3, *off, split=split,
                   config={"channels": (16, 32, 64, 128, 256)})
    rows = list(csv.DictReader((run / "train.csv").open()))
    assert max(float(row["dice_mean"]) for row in rows) > 0.95


def test_best_is_the_epoch_with_the_best_validation_dice(tensors, tmp_path):
    _, run = train(tensors, tmp_path, "--epochs", 5)
    rows = list(csv.DictReader((run / "train.csv").open()))
    best = torch.load(run / "best.pt", weights_only=True)
    assert best["epoch"] == 1 + max(range(5), key=lambda i: float(rows[i]["dice_mean"]))
    assert not set(best) & {"optimizer"}


def test_of_validation_cases_with_oedema_only_the_epoch_that_finds_it_is_the_best(tensors, tmp_path, monkeypatch):
    """Not the one that predicts nothing, though it is right about all other labels."""
    epochs = iter([[10, 0], [3, 7], [9, 1]])  # voxels of oedema that are missed and found

    def validate(*_):
        counts = torch.zeros(1, 4, 4, dtype=torch.long)
        counts[0, 0, 0] = 100
        counts[0, 2, 0], counts[0, 2, 2] = next(epochs)
        counts[0, 0, 3] = 5 * int(counts[0, 2, 2] > 0)  # and some enhancing tumour that is not there
        return torch.ones(1), counts

    monkeypatch.setattr(training, "validate", validate)
    _, run = train(tensors, tmp_path, "--epochs", 3)
    best = torch.load(run / "best.pt", weights_only=True)
    assert best["epoch"] == 2 and best["dice_mean"] == pytest.approx(2 * 7 / (10 + 7))
    assert next(csv.DictReader((run / "train.csv").open()))["dice_ET"] == "nan"


def test_validation_cases_without_any_tumour_are_refused_before_the_training(tensors, tmp_path, monkeypatch):
    monkeypatch.setattr(Cases, "label", lambda cases, index: torch.zeros(1, 4, 4, 4, dtype=torch.uint8))
    with pytest.raises(InputError, match="the validation cases have no tumour"):
        train(tensors, tmp_path, "--epochs", 1)


def test_of_equal_epochs_the_first_is_the_best_in_the_checkpoint_and_in_the_plot(tensors, tmp_path, monkeypatch):
    losses, perfect = torch.ones(1), torch.eye(4, dtype=torch.long)[None]
    monkeypatch.setattr(training, "validate", lambda *_: (losses, perfect))
    titles = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: titles.append(figure.axes[1].get_title()))
    _, run = train(tensors, tmp_path, "--epochs", 3)
    assert torch.load(run / "best.pt", weights_only=True)["epoch"] == 1
    assert titles[-1].endswith("in epoch 1")


def test_wherever_the_cases_are_kept_the_training_is_the_same(tensors, tmp_path):
    losses = set()
    for cache, workers in (("device", 0), ("ram", 0), ("disk", 0), ("disk", 2)):
        _, run = train(tensors, tmp_path, "--epochs", 1, "--cache", cache, "--workers", workers,
                       "--run-name", f"{cache}{workers}")  # fmt: skip
        losses.add(losses_of(run)[0])
    assert len(losses) == 1


def test_the_record_of_a_run_is_complete(tensors, tmp_path):
    _, run = train(tensors, tmp_path, "--epochs", 1, "--fold", 2, split=read_split(tensors, 2))
    config = json.loads((run / "config.json").read_text())
    assert config["arguments"]["learning_rate"] == 3e-3 and config["arguments"]["fold"] == 2
    assert config["split"] == read_split(tensors, 2)
    assert len(config["data_manifest_sha256"]) == 64 and config["size"] == [32, 32, 32]
    row = next(csv.DictReader((run / "train.csv").open()))
    assert float(row["learning_rate"]) > 0 and float(row["step_ms"]) > float(row["data_wait_ms"]) >= 0


def test_a_loss_that_is_not_finite_stops_the_run_and_spoils_no_checkpoint(tensors, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "make_loss", lambda: lambda logits, label: logits.mean() * float("nan"))
    with pytest.raises(InputError, match="learning-rate"):
        train(tensors, tmp_path, "--epochs", 2)
    assert not list(tmp_path.rglob("*.pt"))


# ---- the average of the weights ------------------------------------------------------------------------------------


def test_the_average_forgets_by_the_decay_and_early_updates_sooner():
    average, model = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    expected = average.weight.item()
    for step, weight in enumerate([1.0, 2.0, 4.0, 8.0]):
        torch.nn.init.constant_(model.weight, weight)
        training.follow(average, model, 0.25, step)
        decay = [1 / 10, 2 / 11, 0.25, 0.25][step]  # 3 / 12 is the decay that was asked for
        expected = decay * expected + (1 - decay) * weight
        assert average.weight.item() == pytest.approx(expected, rel=1e-6)


def test_with_an_average_the_training_is_the_same_and_the_average_is_kept(tensors, tmp_path, monkeypatch):
    plain, _ = train(tensors, tmp_path / "a", "--epochs", 2)
    averages, moved = [], training.follow

    def follow(average, model, decay, step):
        moved(average, model, decay, step)
        averages.append({name: value.clone() for name, value in average.state_dict().items()})

    monkeypatch.setattr(training, "follow", follow)
    _, run = train(tensors, tmp_path / "b", "--epochs", 2, "--ema", 0.9)
    last, best = (torch.load(run / file, weights_only=True) for file in ("last.pt", "best.pt"))
    steps = len(averages) // 2
    for name, value in plain.state_dict().items():
        assert torch.equal(last["trained_model"][name], value)
        assert torch.equal(last["model"][name], averages[-1][name])
        assert torch.equal(best["model"][name], averages[steps * best["epoch"] - 1][name])


def test_the_validated_network_is_the_average(tensors, tmp_path):
    split = read_split(tensors)
    _, run = train(tensors, tmp_path, "--epochs", 1, "--ema", 0.9)
    model, _ = load_model(run)
    cases = Cases(tensors, split["validation"], "ram", CPU)
    settings = cli.settings_of(arguments(tensors), training.Settings)
    losses, _ = training.validate(model, cases, settings, CPU)
    row = next(csv.DictReader((run / "train.csv").open()))
    assert float(row["validation_loss"]) == pytest.approx(losses.mean().item(), rel=1e-4)


# ---- beginning from the weights of a run ---------------------------------------------------------------------------


def test_a_training_begins_with_the_weights_of_a_run_and_names_them_in_its_record(tensors, begun, tmp_path):
    first = begun / RUN
    _, run = train(tensors, tmp_path, "--epochs", 1, "--learning-rate", 1e-12, "--init", first)
    begun_with, trained = (torch.load(r / "best.pt", weights_only=True)["model"] for r in (first, run))
    for name, value in begun_with.items():
        assert torch.allclose(trained[name], value, atol=1e-6), name  # the bias of the output included
    record = json.loads((run / "config.json").read_text())["initial_weights"]
    checksum = zlib.crc32((first / "best.pt").read_bytes())
    assert record["crc32"] == f"{checksum:08x}" and record["checkpoint"].endswith(f"{RUN}/best.pt")
    assert record["epoch"] == torch.load(first / "best.pt", weights_only=True)["epoch"]


def test_patients_of_the_initial_weights_count_as_seen_and_scoring_them_is_warned_of(tensors, begun, tmp_path, capsys):
    first = begun / RUN
    split = runs.read_record(first)["split"]
    (trained_on, *others), (validated_on, *rest) = split["train"], split["validation"]
    exchanged = split | {"train": [*others, validated_on], "validation": [trained_on, *rest]}
    _, run = train(tensors, tmp_path, "--epochs", 1, "--init", first, split=exchanged)
    warning = capsys.readouterr().err
    assert f"trained on 1 of the validation and test cases ({trained_on})" in warning
    assert runs.open_run(run).seen == {patient_of(case) for case in (*split["train"], validated_on)}


def test_images_of_another_scale_than_those_of_the_initial_weights_are_warned_of(tensors, begun, tmp_path, capsys):
    train(tensors, tmp_path / "same", "--epochs", 1, "--init", begun / RUN)
    assert "--normalize" not in capsys.readouterr().err
    scores = tmp_path / "scores"
    shutil.copytree(tensors, scores)
    manifest = json.loads((scores / "manifest.json").read_text())
    manifest["settings"]["normalize"] = "zscore"
    (scores / "manifest.json").write_text(json.dumps(manifest))
    train(scores, tmp_path / "other", "--epochs", 1, "--init", begun / RUN)
    assert "was trained on cases of --normalize percentile, and" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "different"),
    [({"channels": (4, 8, 8, 8, 8)}, "channels [4, 8, 16, 32, 64] (the flags: [4, 8, 8, 8, 8])"),
     (SMALL | {"out_channels": 3}, "out_channels 4 (the flags: 3)")],
    ids=["channels", "regions"],
)  # fmt: skip
def test_weights_of_other_settings_are_no_beginning(tensors, begun, tmp_path, config, different):
    with pytest.raises(InputError, match=re.escape(f"not what these flags ask for: {different}.")):
        train(tensors, tmp_path, "--epochs", 1, "--init", begun / RUN, config=config)
    with pytest.raises(InputError, match="no such checkpoint"):
        train(tensors, tmp_path, "--epochs", 1, "--init", tmp_path / "none")
    assert not list(tmp_path.rglob("config.json"))


# ---- patches and regions -------------------------------------------------------------------------------------------


def test_wherever_native_cases_are_kept_the_training_on_patches_is_the_same(native, tmp_path):
    losses = set()
    for cache, workers in (("ram", 0), ("disk", 0), ("disk", 2)):
        _, run = train(native, tmp_path, "--epochs", 1, "--patch", 32, "--cache", cache, "--workers", workers,
                       "--run-name", f"{cache}{workers}")  # fmt: skip
        losses.add(losses_of(run)[0])
    assert len(losses) == 1


def test_a_run_on_patches_records_what_its_network_takes_and_how_its_cases_were_made(native, tmp_path):
    _, run = train(native, tmp_path, "--epochs", 1, "--patch", 32)
    opened = open_run(run)
    assert opened.size == [32, 32, 32]
    assert opened.preprocessing == {"size": None, "spacing_mm": 1.0, "normalize": "percentile"}
    assert json.loads((run / "config.json").read_text())["arguments"]["patch"] == 32


def settings_for(data, *flags):
    return cli.settings_of(arguments(data, "--epochs", 1, *flags), training.Settings)


@pytest.mark.parametrize("shape", [(40, 33, 50), (20, 40, 32), (32, 32, 32)])
def test_validation_covers_a_whole_case_of_any_size_by_windows(tensors, shape):
    """A network that looks at single voxels gives the same in windows as in one piece."""
    torch.manual_seed(0)
    network, image = torch.nn.Conv3d(4, 3, 1), torch.rand(1, 4, *shape)
    seen = []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    settings = settings_for(tensors, "--patch", 32, "--batch-size", 2)
    with torch.no_grad():
        logits = training.logits_of_cases(network, image, settings)
        whole = training.logits_of_cases(network, image, settings_for(tensors))
    assert torch.allclose(logits, whole, atol=1e-5)
    assert seen.pop() == image.shape and {tuple(windows[1:]) for windows in seen} == {(4, 32, 32, 32)}


def test_a_window_counts_most_in_its_middle(tensors):
    """One axis, two windows: the weights of the two are MONAI's Gaussians of an eighth of the side."""

    class Numbered(torch.nn.Module):
        calls = 0

        def forward(self, windows):
            self.calls += 1
            return torch.full((1, 3, 32, 32, 32), float(self.calls))

    logits = training.logits_of_cases(Numbered(), torch.rand(1, 4, 48, 32, 32), settings_for(tensors, "--patch", 32))
    gaussian = np.exp(-0.5 * ((np.arange(32) - 15.5) / (32 / 8)) ** 2).clip(1e-3)
    weights = np.zeros((2, 48))
    weights[0, :32], weights[1, 16:] = gaussian, gaussian
    expected = (weights[0] + 2 * weights[1]) / weights.sum(0)
    assert np.allclose(logits[0, 0, :, 16, 16], expected, atol=0.02)
    assert np.allclose(logits[0, 0, [0, 23, 24, 47], 16, 16], [1, 1.38, 1.62, 2], atol=0.01)


def test_regions_start_as_likely_as_they_are_frequent(tensors):
    names = read_split(tensors)["train"][:3]
    labels = torch.cat([load_case(tensors / f"{name}.pt")["label"].flatten() for name in names])
    model = build_model("unet", **REGIONS)
    output = [module for module in model.modules() if isinstance(module, torch.nn.Conv3d)][-1]
    training.start_at_class_frequencies(model, Cases(tensors, names, "ram", CPU))
    frequencies = [np.isin(labels, values).mean() for values in ((1, 3), (1, 2, 3), (3,))]
    assert output.bias.sigmoid().tolist() == pytest.approx(frequencies, rel=0.02)


def test_regions_of_one_case_can_be_learnt_by_heart_from_patches_of_it(native, tmp_path):
    name = read_split(native)["train"][0]
    split = {"train": [name] * 8, "validation": [name], "test": [name]}
    off = ["--flip-probability", 0, "--rotate-probability", 0, "--noise-probability", 0]
    _, run = train(native, tmp_path, "--epochs", 6, "--learning-rate", 5e-3, "--regions", "--patch", 32, *off,
                   split=split, config={"channels": (16, 32, 64, 128, 256), "out_channels": 3})
    *_, last = csv.DictReader((run / "train.csv").open())
    assert float(last["dice_WT"]) > 0.95 and float(last["dice_TC"]) > 0.9 and float(last["dice_ET"]) > 0.7
    assert open_run(run).config["out_channels"] == 3


def test_a_run_of_before_patches_and_regions_is_resumed_as_one_without(tensors, begun, tmp_path):
    shutil.copytree(begun, tmp_path / "old")
    path = tmp_path / "old" / RUN / "config.json"
    record = json.loads(path.read_text())
    for flag in ("patch", "regions"):
        del record["arguments"][flag]
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"--patch 16 \(the run: None\)"):
        train(tensors, tmp_path / "old", "--epochs", 3, "--fold", 1, "--patch", 16, "--resume",
              config={"channels": (4, 8, 16), "strides": (2, 2)})  # fmt: skip
    train(tensors, tmp_path / "old", "--epochs", 3, "--fold", 1, "--resume")


def test_a_patch_that_the_network_cannot_halve_is_refused_with_one_that_it_can(tensors, tmp_path):
    with pytest.raises(InputError, match=r"--patch 24: unet needs sides that 16 divides\. Choose --patch 32\."):
        train(tensors, tmp_path, "--epochs", 1, "--patch", 24)
    with pytest.raises(InputError, match=r"--patch 16: unet needs sides of 32 or more: .* Choose --patch 32 or more"):
        train(tensors, tmp_path, "--epochs", 1, "--patch", 16)


# ---- beginning and resuming ----------------------------------------------------------------------------------------


def test_a_run_is_not_overwritten_and_a_missing_one_not_resumed(tensors, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        train(tensors, tmp_path, "--epochs", 1, "--resume")
    assert not (tmp_path / RUN).exists()
    train(tensors, tmp_path, "--epochs", 1)
    with pytest.raises(InputError, match="already holds a run"):
        train(tensors, tmp_path, "--epochs", 1)
    with pytest.raises(InputError, match="not what these flags ask for"):
        train(tensors, tmp_path, "--epochs", 2, "--resume", config={"channels": (4, 8, 16, 32, 32)})
    last = tmp_path / RUN / "last.pt"
    torch.save(torch.load(last, weights_only=True) | {"network": "swinunetr"}, last)
    with pytest.raises(InputError, match="a swinunetr, not a unet"):
        train(tensors, tmp_path, "--epochs", 2, "--resume")


@pytest.mark.parametrize(("name", "record"), [("pretrained", {}), ("fold1", {"imported_from": {"file": "model.pt"}})])
def test_weights_that_came_from_elsewhere_are_not_overwritten_by_a_training(tmp_path, name, record):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="already holds a run"):
        resuming.record_to_resume(folder, None, {"resume": False}, {})


@pytest.fixture(scope="module")
def begun(tensors, tmp_path_factory):
    """A run of two epochs in a folder that stands for the repository."""
    folder = tmp_path_factory.mktemp("begun")
    train(tensors, folder, "--epochs", 2, "--fold", 1)
    return folder


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--fold", 2], r"--fold 2 \(the run: 1\)"),
        (["--learning-rate", 0.5], r"--learning-rate 0.5 \(the run: 0.003\)"),
        (["--batch-size", 2, "--accumulate", 3], r"--batch-size 2 \(the run: 1\), --accumulate 3 \(the run: 1\)"),
        (["--noise-sd", 0.3], "--noise-sd 0.3"),
        (["--amp", "bf16"], "--amp bf16"),
        (["--patch", 32], r"--patch 32 \(the run: None\)"),
        (["--regions"], r"--regions True \(the run: False\)"),
        (["--epochs", 1], r"--epochs 1 \(the run: 2"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings_than_it_began_with(tensors, begun, flags, named):
    record = (begun / RUN / "config.json").read_bytes()
    with pytest.raises(InputError, match=named):
        train(tensors, begun, "--epochs", 2, "--fold", 1, *flags, "--resume")
    assert (begun / RUN / "config.json").read_bytes() == record


def test_a_run_is_not_resumed_on_other_data_or_another_split(raw, tensors, begun, tmp_path):
    run_script("preprocess_brats.py", raw, "other", "--size", 32, "--limit", 11, cwd=tmp_path)
    with pytest.raises(InputError, match="not the data"):
        train(tmp_path / "other", begun, "--epochs", 2, "--fold", 1, "--resume")
    split = read_split(tensors, 1)
    exchanged = {**split, "train": split["validation"], "validation": split["train"]}
    with pytest.raises(InputError, match="not the split"):
        train(tensors, begun, "--epochs", 2, "--fold", 1, "--resume", split=exchanged)


def test_a_run_of_a_network_without_the_newer_settings_is_resumed(tensors, begun, tmp_path):
    shutil.copytree(begun, tmp_path / "old")
    folder = tmp_path / "old" / RUN
    last, record = torch.load(folder / "last.pt", weights_only=True), json.loads((folder / "config.json").read_text())
    for setting in ("variant", "convolutions", "residual", "upsampling"):
        del last["config"][setting]
    for flag in ("augmentation", "copy_paste", "ema", "init"):
        del record["arguments"][flag]
    torch.save(last, folder / "last.pt")
    (folder / "config.json").write_text(json.dumps(record))
    for flags, named in ((["--ema", 0.9], r"--ema 0.9 \(the run: 0.0\)"), (["--augmentation", "strong"], "basic")):
        with pytest.raises(InputError, match=named):
            train(tensors, tmp_path / "old", "--epochs", 3, "--fold", 1, *flags, "--resume")
    train(tensors, tmp_path / "old", "--epochs", 3, "--fold", 1, "--resume")


def test_more_epochs_are_allowed_said_and_appended_to_the_record(tensors, tmp_path, capsys):
    train(tensors, tmp_path, "--epochs", 1)
    first = json.loads((tmp_path / RUN / "config.json").read_text())
    capsys.readouterr()
    train(tensors, tmp_path, "--epochs", 2, "--cache", "disk", "--workers", 0, "--resume")
    assert "after epoch 1" in (said := capsys.readouterr().out) and "--epochs is 2, was 1" in said
    train(tensors, tmp_path, "--epochs", 3, "--cache", "disk", "--workers", 0, "--resume")
    record = json.loads((tmp_path / RUN / "config.json").read_text())
    second, third = record.pop("resumptions")
    assert record == first
    assert second["after_epoch"] == 1 and second["changed"]["epochs"] == 2 and second["changed"]["cache"] == "disk"
    assert third["after_epoch"] == 2 and third["changed"] == {"epochs": 3}
    assert len(losses_of(tmp_path / RUN)) == 3
    with pytest.raises(InputError, match=r"--epochs 2 \(the run: 3"):
        train(tensors, tmp_path, "--epochs", 2, "--resume")


def test_a_resumed_run_keeps_the_number_type_that_auto_chose(tensors, tmp_path, monkeypatch):
    """Though the other one is faster by now."""
    monkeypatch.setattr(amp, "native_dtypes", lambda device: {torch.float32, torch.bfloat16})
    monkeypatch.setattr(amp, "step_seconds", lambda *_: {"off": 1.0, "bf16": 2.0})
    train(tensors, tmp_path, "--epochs", 1, "--amp", "auto")
    monkeypatch.setattr(amp, "step_seconds", lambda *_: {"off": 2.0, "bf16": 1.0})
    train(tensors, tmp_path, "--epochs", 2, "--amp", "auto", "--resume")
    assert open_run(tmp_path / RUN).amp == "off"


def test_a_run_resumes_with_another_number_of_processes_which_is_said_and_recorded(tensors, begun, tmp_path, capsys):
    """Its effective batch may stay as it was, by --accumulate, or change with their number."""
    for name, flags in (("fewer", []), ("accumulated", ["--accumulate", 2])):
        folder = shutil.copytree(begun, tmp_path / name) / RUN
        record = json.loads((folder / "config.json").read_text()) | {"processes": 2, "effective_batch_size": 2}
        (folder / "config.json").write_text(json.dumps(record))
        with pytest.raises(InputError, match=r"--accumulate 3 \(the run: 1\)"):
            train(tensors, tmp_path / name, "--epochs", 3, "--fold", 1, "--accumulate", 3, "--resume")
        capsys.readouterr()
        train(tensors, tmp_path / name, "--epochs", 3, "--fold", 1, *flags, "--resume")
        said = capsys.readouterr().out
        assert "the number of processes is 1, was 2" in said
        assert ("the effective batch size" in said and "is 1, was 2." in said) == (name == "fewer")
        (resumption,) = json.loads((folder / "config.json").read_text())["resumptions"]
        assert (resumption["processes"], resumption["effective_batch_size"]) == (1, 1 if name == "fewer" else 2)
        assert len(losses_of(folder)) == 3


def test_within_an_epoch_the_number_of_processes_stays(tensors, begun, tmp_path):
    folder = shutil.copytree(begun, tmp_path / "begun") / RUN
    record = json.loads((folder / "config.json").read_text()) | {"processes": 2}
    (folder / "config.json").write_text(json.dumps(record))
    last = torch.load(folder / "last.pt", weights_only=True)
    torch.save(last | {"progress": [{"step": 1}, {"step": 1}]}, folder / "last.pt")
    with pytest.raises(InputError, match="within an epoch shared by 2 processes"):
        train(tensors, tmp_path / "begun", "--epochs", 3, "--fold", 1, "--resume")
    assert json.loads((folder / "config.json").read_text()) == record


@pytest.mark.slow
def test_a_run_resumes_with_other_attention_and_checkpointing_but_not_with_another_network(tensors, tmp_path):
    flags = ["--feature-size", 12, "--window-size", 2, "--epochs", 1, "--run-name", "swin"]
    run_script("train_swinunetr.py", tensors, *flags, cwd=tmp_path)
    longer = ["--resume", "--checkpointing", "full", "--attention", "sdpa", *flags]
    longer[longer.index("--epochs") + 1] = 2
    run_script("train_swinunetr.py", tensors, *longer, cwd=tmp_path)
    run = tmp_path / "models/swinunetr/results/swin"
    assert len(list(csv.DictReader((run / "train.csv").open()))) == 2
    other = run_script("train_swinunetr.py", tensors, *longer, "--feature-size", 24, cwd=tmp_path, status=2)
    assert "not what these flags ask for" in other.stderr
    last = run / "last.pt"
    torch.save(torch.load(last, weights_only=True) | {"modalities": ["flair", "t1ce", "t1", "t2"]}, last)
    assert "channels" in run_script("train_swinunetr.py", tensors, *longer, cwd=tmp_path, status=2).stderr


# ---- the folder ----------------------------------------------------------------------------------------------------


def test_a_run_lies_below_the_repository_whatever_the_working_directory(tensors, tmp_path):
    (tmp_path / "repository").mkdir()
    (tmp_path / "elsewhere").mkdir()
    copy_of_the_code(tmp_path / "repository")
    done = subprocess.run([sys.executable, "../repository/train_unet.py", tensors, "--epochs", "1", "--run-name", "a"],
                          cwd=tmp_path / "elsewhere", capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "repository/models/unet/results/a/best.pt").is_file()
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("name", ["../a", "a/b", "..", ".", "", "a\\b"])
def test_a_run_name_that_leads_elsewhere_is_refused(tmp_path, name):
    result = run_script("train_unet.py", "DATA", "--run-name", name, cwd=tmp_path, status=2)
    assert "--run-name" in result.stderr and "not the name of a single folder" in result.stderr


def test_data_below_the_repository_is_recorded_as_it_is_called_there(tensors, tmp_path):
    shutil.copytree(tensors, tmp_path / "copied")
    _, run = train(tmp_path / "copied", tmp_path, "--epochs", 1)
    assert json.loads((run / "config.json").read_text())["arguments"]["data"] == "copied"
    _, run = train(tensors, tmp_path, "--epochs", 1, "--run-name", "outside")
    assert Path(json.loads((run / "config.json").read_text())["arguments"]["data"]) == tensors.resolve()


def test_of_two_trainings_of_one_name_the_second_is_refused(tmp_path):
    """While the first lives; what it leaves behind when it is killed does not stop the next."""
    hold = ("import sys, time; from pathlib import Path; from models import runs\n"
            "with runs.locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)")  # fmt: skip
    run = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", hold, run], cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout.readline() == "held\n"
            with pytest.raises(InputError, match=f"process {first.pid} on"), runs.locked(run):
                pass
        finally:
            first.kill()
    with runs.locked(run):
        assert (run / ".lock").read_text().startswith(f"{os.getpid()} ")
    assert not run.exists()  # nothing was written into it


def test_a_lock_of_another_machine_is_not_taken_over(tmp_path):
    (tmp_path / ".lock").write_text("1 elsewhere")
    with pytest.raises(InputError, match=r"process 1 on elsewhere.*delete .*\.lock"), runs.locked(tmp_path):
        pass
    assert socket.gethostname() != "elsewhere" and (tmp_path / ".lock").exists()


# ---- opening a run -------------------------------------------------------------------------------------------------


def test_a_run_is_opened_by_its_folder_or_a_checkpoint_in_it(begun, tensors):
    run = open_run(begun / RUN)
    assert (run.name, run.network, run.size) == ("test", "unet", [32, 32, 32])
    assert run.preprocessing == {"size": 32, "spacing_mm": 1.0, "normalize": "percentile"}
    assert run.config["channels"] == list(SMALL["channels"]) and run.amp == "off"
    assert run.split == read_split(tensors, 1) and run.data.samefile(tensors)
    last = open_run(begun / RUN / "last.pt")
    assert last == replace(run, checkpoint=begun / RUN / "last.pt", epoch=2)


def test_a_run_of_before_the_choice_of_a_normalization_was_trained_on_scaled_cubes(begun, tmp_path):
    shutil.copytree(begun / RUN, tmp_path / "old")
    record = json.loads((tmp_path / "old/config.json").read_text())
    del record["preprocessing"]
    (tmp_path / "old/config.json").write_text(json.dumps(record | {"spacing_mm": 1.5}))
    assert open_run(tmp_path / "old").preprocessing == {"size": 32, "spacing_mm": 1.5, "normalize": "percentile"}


def test_a_checkpoint_can_be_opened_without_its_folder(begun, tmp_path):
    shutil.copy(begun / RUN / "best.pt", tmp_path / "alone.pt")
    run = open_run(tmp_path / "alone.pt")
    assert run.network == "unet" and (run.size, run.split, run.data) == (None, None, None)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: damaged"):
        open_run(tmp_path / "alone.pt")


def test_weights_load_strictly_or_not_at_all(tensors, tmp_path):
    _, run = train(tensors, tmp_path, "--epochs", 1)
    model, checkpoint = load_model(run)
    for name, value in model.state_dict().items():
        assert torch.equal(value, checkpoint["model"][name])
    checkpoint["model"].popitem()
    torch.save(checkpoint, tmp_path / "short.pt")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("hello")
    for file, reason in (("short.pt", "do not fit"), ("other.pt", "not a checkpoint"), ("text.pt", "damaged"),
                         ("none.pt", "no such checkpoint")):
        with pytest.raises(InputError, match=reason):
            load_model(tmp_path / file)
    torch.save(checkpoint | {"modalities": ["flair", "t1ce", "t1", "t2"]}, tmp_path / "order.pt")
    with pytest.raises(InputError, match="channels"):
        load_model(tmp_path / "order.pt")


def test_a_size_that_the_network_cannot_halve_is_refused_with_one_that_it_can(raw, tmp_path):
    run_script("preprocess_brats.py", raw, "out", "--size", 24, "--limit", 3, cwd=tmp_path)
    with pytest.raises(InputError, match="--size 32"):
        train(tmp_path / "out", tmp_path, "--epochs", 1)


@pytest.mark.parametrize(("network", "config", "side"), [("unet", {}, 16), ("swinunetr", {"window_size": 17}, 32)])
def test_a_size_that_is_too_small_for_the_network_is_refused_with_the_smallest_that_fits(network, config, side):
    with pytest.raises(InputError, match=f"DATA: cases of {side} x .* Preprocess with --size {2 * side} or more"):
        refuse_unfit_size(network, config, [side] * 3, "DATA")
    refuse_unfit_size(network, config, [2 * side] * 3, "DATA")


@pytest.mark.parametrize(
    ("network", "config"), [("unet", SMALL), ("swinunetr", {"feature_size": 12, "window_size": 4})]
)
def test_the_first_ten_losses_are_those_that_are_committed(tensors, tmp_path, monkeypatch, network, config):
    """The same on the machine that they were computed on, with the same torch; elsewhere up to rounding. Where the
    change is meant, `WRITE_GOLDEN=1 pytest tests/test_training.py -k ten_losses -n 0` writes them anew."""
    losses, loss_of = [], training.make_loss()

    def recorded(logits, label):
        loss = loss_of(logits, label)
        if loss.requires_grad:
            losses.append(loss.item())
        return loss

    monkeypatch.setattr(training, "make_loss", lambda: recorded)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(tensors, tmp_path, "--epochs", 1, "--learning-rate", 1e-3, network=network, config=config)
        machine = f"{device_name(CPU)}, torch {torch.__version__}"
    finally:
        torch.set_num_threads(threads)
    assert len(losses) == 10
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("WRITE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(golden | {network: {"machine": machine, "losses": losses}}, indent=1) + "\n")
    elif golden[network]["machine"] == machine:
        assert losses == golden[network]["losses"]
    else:
        assert losses == pytest.approx(golden[network]["losses"], rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_whole_road_runs_on_a_gpu(tensors, tmp_path):
    run_script("train_unet.py", tensors, "--epochs", 2, "--run-name", "gpu", "--device", "cuda", cwd=tmp_path)
    rows = list(csv.DictReader((tmp_path / "models/unet/results/gpu/train.csv").open()))
    assert float(rows[-1]["peak_gib"]) > 0
