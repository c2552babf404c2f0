"""The training loop: schedule, accumulation, resuming, learning at all."""

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script

from models import build_model, cli, load_model, plots, training
from models.dataset import Cases, choose_input, load_case, read_split
from models.errors import InputError

SMALL = {"channels": (4, 8, 16, 32, 64)}
CPU = torch.device("cpu")


def arguments(data, *flags):
    parser = argparse.ArgumentParser()
    cli.add_training_arguments(parser)
    # In float32: --amp auto measures, and need not decide the same way twice.
    return parser.parse_args([str(data), "--run-name", "test", "--amp", "off", *map(str, flags)])


def train(data, folder, *flags, split=None, config=SMALL):
    """Train in `folder`; returns the model and the run."""
    args = arguments(data, *flags)
    split = split or read_split(data)
    os.chdir(folder)
    training.setup(args)
    args.cache, args.workers = choose_input(args, split, CPU)
    model = build_model("unet", **config)
    size = training.check_cases(args.data, split, "unet")
    args.amp = training.choose_amp(model, args, size, CPU)
    run = training.open_run(model, args, split, size, CPU)
    training.fit(model, args, split, run, CPU)
    return model, Path(folder) / run


@pytest.fixture(autouse=True)
def stay_here():
    here = Path.cwd()
    yield
    os.chdir(here)


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
    torch.manual_seed(0)
    model = build_model("unet", **SMALL)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    training.train_epoch(model, cases, 0, args, optimizer, torch.amp.GradScaler("cpu", enabled=False), CPU, None)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_accumulated_steps_equal_one_large_batch_in_the_short_last_window_too(tensors):
    cases = Cases(tensors, read_split(tensors)["train"][:5], "ram", CPU)
    large, accumulated = one_epoch(tensors, cases, 3, 1), one_epoch(tensors, cases, 1, 3)  # windows of 3 and 2
    assert torch.allclose(large, accumulated, atol=2e-5)


def test_four_epochs_equal_two_and_a_resumed_two_bit_for_bit(tensors, tmp_path):
    flags = ["--epochs", 4, "--accumulate", 2]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, run = train(tensors, tmp_path / "a", *flags)

    written = training.write_epoch

    def stop_after_two(run, history, *rest):
        written(run, history, *rest)
        if len(history) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "write_epoch", stop_after_two)
        train(tensors, tmp_path / "b", *flags)
    resumed, again = train(tensors, tmp_path / "b", *flags, "--resume")
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    best = [torch.load(r / "best.pt", weights_only=True)["epoch"] for r in (run, again)]
    assert best[0] == best[1]
    losses = [[row["train_loss"] for row in csv.DictReader((r / "train.csv").open())] for r in (run, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


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
        losses.add(next(csv.DictReader((run / "train.csv").open()))["train_loss"])
    assert len(losses) == 1


def test_the_record_of_a_run_is_complete(tensors, tmp_path):
    _, run = train(tensors, tmp_path, "--epochs", 1, "--fold", 2, split=read_split(tensors, 2))
    config = json.loads((run / "config.json").read_text())
    assert config["arguments"]["learning_rate"] == 1e-3 and config["arguments"]["fold"] == 2
    assert config["split"] == read_split(tensors, 2)
    assert len(config["data_manifest_sha256"]) == 64 and config["size"] == [32, 32, 32]
    row = next(csv.DictReader((run / "train.csv").open()))
    assert float(row["learning_rate"]) > 0 and float(row["step_ms"]) > float(row["data_wait_ms"]) >= 0


def test_a_loss_that_is_not_finite_stops_the_run_and_spoils_no_checkpoint(tensors, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "make_loss", lambda: lambda logits, label: logits.mean() * float("nan"))
    with pytest.raises(InputError, match="learning-rate"):
        train(tensors, tmp_path, "--epochs", 2)
    assert not list(tmp_path.rglob("*.pt"))


def test_a_run_is_not_overwritten_and_a_missing_one_not_resumed(tensors, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        train(tensors, tmp_path, "--epochs", 1, "--resume")
    train(tensors, tmp_path, "--epochs", 1)
    with pytest.raises(InputError, match="holds a run already"):
        train(tensors, tmp_path, "--epochs", 1)
    with pytest.raises(InputError, match="not what these flags ask for"):
        train(tensors, tmp_path, "--epochs", 2, "--resume", config={"channels": (4, 8, 16, 32, 32)})
    last = tmp_path / "models/unet/results/test/last.pt"
    torch.save(torch.load(last, weights_only=True) | {"network": "swinunetr"}, last)
    with pytest.raises(InputError, match=r"a swinunetr of .* not what these flags ask for"):
        train(tensors, tmp_path, "--epochs", 2, "--resume")


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


def test_two_processes_train_as_one(tensors, tmp_path):
    """Started by torchrun: both see all cases between them and write one run."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(ROOT / "train_unet.py"), str(tensors), "--epochs", "1", "--run-name", "two"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "models/unet/results/two"
    config = json.loads((run / "config.json").read_text())
    assert config["processes"] == 2 and config["effective_batch_size"] == 2
    assert done.stdout.count("Test Dice") == 1 and (run / "test_results.csv").is_file()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_whole_road_runs_on_a_gpu(tensors, tmp_path):
    run_script("train_unet.py", tensors, "--epochs", 2, "--run-name", "gpu", "--device", "cuda", cwd=tmp_path)
    rows = list(csv.DictReader((tmp_path / "models/unet/results/gpu/train.csv").open()))
    assert float(rows[-1]["peak_gib"]) > 0
