"""What is left when a training, or preprocessing, is stopped, and that it goes on as if it had not been."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import test_training
import torch
from conftest import copy_of_the_code, needs_signals, read
from kill_and_resume import kill_often, subjects, unequal, without_machine
from test_training import CPU, RUN, SMALL, arguments

from models import amp, build_model, checkpoints, cli, files, runs, training
from models.dataset import read_split
from models.errors import InputError, Interrupted
from models.files import remove_temporaries, whole_file, write_atomically
from models.interruption import noted_signals


def train(data, folder, *flags):
    """As the scripts do, with four cases."""
    split = read_split(data)
    return test_training.train(data, folder, *flags, split=split | {"train": split["train"][:4]})


def at_step(number, action):
    """Have `action` done in the step of that number, counted from 1 over all epochs."""
    augment, steps = training.augment, iter(range(1, 10**6))

    def counted(*arguments, **more):
        if next(steps) == number:
            action()
        return augment(*arguments, **more)

    return counted


def stopped_and_resumed(data, folder, flags, monkeypatch, step, action, error):
    with monkeypatch.context() as patch, pytest.raises(error) as stopped:
        patch.setattr(training, "augment", at_step(step, action))
        train(data, folder, *flags)
    before = torch.load(folder / RUN / "last.pt", weights_only=True)
    train(data, folder, *flags, "--resume")
    return before, stopped.value


def assert_equal_runs(a, b):
    for name in ("best.pt", "last.pt"):
        assert not unequal(*(torch.load(run / name, weights_only=True) for run in (a / RUN, b / RUN))), name
    assert without_machine(a / RUN / "train.csv") == without_machine(b / RUN / "train.csv")


@pytest.fixture(scope="module")
def accumulated(tensors, tmp_path_factory):
    """Two epochs of four steps with everything that draws random numbers or is kept between steps; the flags of it."""
    flags = ["--epochs", 2, "--accumulate", 3, "--ema", 0.9, "--augmentation", "strong", "--copy-paste", 0.5]
    folder = tmp_path_factory.mktemp("whole")
    train(tensors, folder, *flags)
    return folder, flags


@needs_signals
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_within_an_update_and_the_run_goes_on_bit_for_bit(
    tensors, accumulated, tmp_path, monkeypatch, name
):
    whole, flags = accumulated
    number = signal.Signals[name]
    before, stopped = stopped_and_resumed(
        tensors, tmp_path, flags, monkeypatch, 6, lambda: [os.kill(os.getpid(), number) for _ in range(3)], Interrupted
    )
    assert before["epoch"] == 1 and before["progress"][0]["step"] == 2  # of the three of an update
    assert stopped.args[0] == number
    assert "--run-name test --resume" in stopped.args[1] and "epoch 2 up to step 2 of 4" in stopped.args[1]
    assert "\n" not in stopped.args[1]
    assert_equal_runs(whole, tmp_path)
    (resumption,) = json.loads((tmp_path / RUN / "config.json").read_text())["resumptions"]
    assert resumption["after_epoch"] == 1 and resumption["after_step"] == 2


def test_what_was_saved_by_the_clock_survives_a_crash(tensors, accumulated, tmp_path, monkeypatch):
    def crash():
        raise RuntimeError("no such memory")

    whole, flags = accumulated
    flags = [*flags, "--save-minutes", 1e-9]
    before, _ = stopped_and_resumed(tensors, tmp_path, flags, monkeypatch, 3, crash, RuntimeError)
    assert before["epoch"] == 0 and before["progress"][0]["step"] == 2
    assert_equal_runs(whole, tmp_path)


@needs_signals
def test_a_signal_while_validating_keeps_the_whole_training_of_the_epoch(tensors, tmp_path, monkeypatch):
    train(tensors, tmp_path / "whole", "--epochs", 1)
    confusion = training.confusion

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return confusion(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(training, "confusion", interrupted)
        train(tensors, tmp_path / "stopped", "--epochs", 1)
    assert torch.load(tmp_path / "stopped" / RUN / "last.pt", weights_only=True)["progress"][0]["step"] == 4
    train(tensors, tmp_path / "stopped", "--epochs", 1, "--resume")
    assert_equal_runs(tmp_path / "whole", tmp_path / "stopped")


def test_a_run_within_an_epoch_of_several_processes_needs_as_many(tensors, accumulated, tmp_path):
    whole, flags = accumulated
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / RUN / "last.pt"
    torch.save(torch.load(path, weights_only=True) | {"progress": [{"step": 1}, {"step": 1}]}, path)
    with pytest.raises(InputError, match="2 processes"):
        train(tensors, tmp_path / "run", *flags, "--resume")


@needs_signals
def test_noted_signals_raise_nothing_and_give_the_handlers_back():
    before = signal.getsignal(signal.SIGTERM)
    with noted_signals() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert received == [signal.SIGTERM, signal.SIGINT] and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (Interrupted(15, "Stopped."), 143)])
def test_a_script_that_a_signal_ended_says_so_in_its_status(capsys, error, status):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == status and capsys.readouterr().err in ("Interrupted.\n", "Stopped.\n")


# ---- best.pt -------------------------------------------------------------------------------------------------------


def test_a_resumed_run_does_not_overwrite_a_better_best(tensors, tmp_path, monkeypatch):
    """As an interruption between best.pt and last.pt leaves them, where a GPU then finds a worse epoch."""
    train(tensors, tmp_path, "--epochs", 1)
    path = tmp_path / RUN / "best.pt"
    torch.save(torch.load(path, weights_only=True) | {"epoch": 2, "dice_mean": 0.999}, path)
    kept = path.read_bytes()
    train(tensors, tmp_path, "--epochs", 2, "--resume")
    assert path.read_bytes() == kept


def test_the_best_of_an_older_run_is_scored_anew(tensors, tmp_path, capsys):
    """Its score was the mean over cases, with 1 for what a case does not have."""
    train(tensors, tmp_path, "--epochs", 1)
    best, last = (tmp_path / RUN / name for name in ("best.pt", "last.pt"))
    score = torch.load(best, weights_only=True)["dice_mean"]
    for path in (best, last):
        torch.save(torch.load(path, weights_only=True) | {"format": 1, "dice_mean": 1.0}, path)
    capsys.readouterr()
    train(tensors, tmp_path, "--epochs", 3, "--resume")
    assert f"Dice {score:.4f} of the pooled voxels" in capsys.readouterr().out
    scores = [float(row["dice_mean"]) for row in read(tmp_path / RUN / "train.csv")]
    assert torch.load(best, weights_only=True)["epoch"] == 1 + scores.index(max(scores))


# ---- losses that are not finite ------------------------------------------------------------------------------------


def epoch_with_loss(data, monkeypatch, loss_of, *flags, scaler=None):
    """One epoch of a network whose loss is what `loss_of(logits, number of the step)` says."""
    settings = cli.settings_of(arguments(data, "--epochs", 1, *flags), training.Settings)
    steps = iter(range(1, 100))
    monkeypatch.setattr(training, "make_loss", lambda: lambda logits, label: loss_of(logits, next(steps)))
    names = read_split(data)["train"][:7]
    cases = training.Cases(data, names, "ram", CPU)
    model = build_model("unet", **SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    learner = checkpoints.Learner(model, None, optimizer, scaler, "off")
    _, progress = checkpoints.begin_epoch(model, cases, 0, settings, CPU, None)
    return progress.cases, lambda: training.train_epoch(model, cases, 0, settings, learner, CPU)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_nan_ends_the_training_with_its_case_named(tensors, monkeypatch, accumulate):
    order, run = epoch_with_loss(
        tensors, monkeypatch, lambda logits, step: logits.mean() * (float("nan") if step == 4 else 1),
        "--accumulate", accumulate,
    )  # fmt: skip
    with pytest.raises(InputError, match=rf"the loss of {order[3][0]} is not finite \(epoch 1, step 4\)"):
        run()


def without_gradient(logits):
    """Finite, but its gradient is not: the square root's at 0 is infinite, times 0."""
    return logits.mean() + (logits - logits.detach()).abs().sum().sqrt()


def test_a_gradient_that_is_nan_ends_the_training_with_its_case_named(tensors, monkeypatch):
    order, run = epoch_with_loss(
        tensors, monkeypatch, lambda logits, step: without_gradient(logits) if step == 3 else logits.mean()
    )
    with pytest.raises(InputError, match=f"the gradient of {order[2][0]} is not finite .*step 3"):
        run()


def test_updates_that_a_scaler_leaves_out_end_the_training_when_no_scale_helps(tensors, monkeypatch):
    few = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    _, run = epoch_with_loss(tensors, monkeypatch, lambda logits, step: without_gradient(logits), scaler=few)
    run()  # seven, as at the start of many trainings
    many = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    order, run = epoch_with_loss(tensors, monkeypatch, lambda logits, step: without_gradient(logits), scaler=many)
    with pytest.raises(InputError, match=f"the gradient of {order[0][0]}, .* and 2 more cases is not finite"):
        run()


# ---- files ---------------------------------------------------------------------------------------------------------


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(files.os, "replace", lambda *paths: (done.append("name"), replace(*paths)))
    monkeypatch.setattr(files.os, "fsync", lambda file: (done.append("disk"), fsync(file)))
    write_atomically(tmp_path / "a", "new")
    assert done == (["disk", "name", "disk"] if os.name != "nt" else ["disk", "name"])


def test_the_old_file_is_kept_until_the_new_one_is_whole(tmp_path):
    write_atomically(tmp_path / "last.pt", "old")
    with pytest.raises(RuntimeError), whole_file(tmp_path / "last.pt") as file:
        file.write(b"ne")
        file.flush()
        assert (tmp_path / "last.pt").read_text() == "old"
        raise RuntimeError
    assert (tmp_path / "last.pt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_what_killed_processes_were_writing_is_removed(tmp_path):
    (tmp_path / ".last.pt.123.tmp").touch()
    (tmp_path / "last.pt").touch()
    with runs.locked(tmp_path):
        assert not (tmp_path / ".last.pt.123.tmp").exists()
    (tmp_path / ".manifest.json.1.tmp").touch()
    (tmp_path / ".C1.pt.1.tmp").touch()
    remove_temporaries(tmp_path, "*.pt.*")
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", ".manifest.json.1.tmp"}


# ---- whole scripts -------------------------------------------------------------------------------------------------


@needs_signals
@pytest.mark.slow
def test_slurms_signals_end_a_training_in_five_seconds_with_what_to_do(tensors, tmp_path):
    """Sent to the workers as well, as scancel does it, and twice."""
    copy_of_the_code(tmp_path)
    command = [sys.executable, "train_unet.py", tensors, "--epochs", 500, "--run-name", "a", "--cache", "disk"]
    run = tmp_path / "models/unet/results/a"
    for number, more in ((signal.SIGTERM, []), (signal.SIGUSR1, ["--resume"])):
        process = subprocess.Popen([*map(str, command), *more], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                                   start_new_session=True)  # fmt: skip
        rows = len(read(run / "train.csv")) if more else 0
        while not (run / "train.csv").exists() or len(read(run / "train.csv")) <= rows:
            time.sleep(0.05)
        begin = time.monotonic()
        os.killpg(process.pid, number)
        os.killpg(process.pid, number)
        _, said = process.communicate(timeout=60)
        assert time.monotonic() - begin < 5
        assert process.returncode == 128 + number and "Traceback" not in said
        assert "--run-name a --resume" in said.splitlines()[-1]
        assert not (run / ".lock").exists()


@needs_signals
@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_script_goes_on_as_if_it_had_not_been(tmp_path, which):
    """The short form of tests/kill_and_resume.py."""
    subject = subjects(tmp_path, cases=12, epochs=3)[which]
    row = kill_often(subject, tmp_path, 2, random.Random(0))
    assert (row["kills"], row["different"]) == (2, 0)


def test_two_deterministic_runs_are_equal_and_measure_nothing(tensors, tmp_path, monkeypatch):
    monkeypatch.setattr(amp, "step_seconds", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(amp, "native_dtypes", lambda device: {torch.float32, torch.bfloat16})
    setup = training.setup
    monkeypatch.setattr(training, "setup", lambda device, seed: setup(device, seed, deterministic=True))
    try:
        for name in ("a", "b"):
            train(tensors, tmp_path / name, "--epochs", 1, "--deterministic", "--amp", "auto")
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_equal_runs(tmp_path / "a", tmp_path / "b")


