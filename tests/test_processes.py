"""Several processes, as torchrun starts them: they train as one, say and write what one says and writes, and end
together. (Shared evaluations: test_evaluate.py.)"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import copy_of_the_code, read, run_script

from models import device, resuming, runs
from models.device import decided_once, join_processes
from models.errors import InputError

SMALL = ["--channels", 4, 8, 16, 32, 64, "--amp", "off"]
PLAIN = [*SMALL, "--flip-probability", 0, "--rotate-probability", 0, "--noise-probability", 0, "--learning-rate", 1e-3]
RUN = "models/unet/results/run"
# A training in which the second process does something before its second epoch, unless it was started again.
IN_EPOCH_2 = """
import os, runpy, signal, time
from datetime import timedelta
import torch.distributed as dist
from models import device, training
train_epoch = training.train_epoch

def disturbed(model, cases, epoch, *rest):
    if epoch == 1 and (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        {}
    return train_epoch(model, cases, epoch, *rest)

training.train_epoch = disturbed
device.join_processes.__defaults__ = (None, timedelta(seconds=20))
runpy.run_path("train_unet.py", run_name="__main__")
"""


def torchrun(folder: Path, script: str, *arguments, processes=2, restarts=0) -> subprocess.CompletedProcess:
    """Start processes in a copy of the code, from there."""
    copy_of_the_code(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes,
               "--max-restarts", restarts, script, *arguments]  # fmt: skip
    return subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, timeout=300)


def curve(run: Path) -> list[tuple[float, float, float]]:
    rows = read(run / "train.csv")
    return [tuple(float(row[key]) for key in ("train_loss", "validation_loss", "learning_rate")) for row in rows]


def test_two_processes_learn_what_one_learns_from_batches_of_twice_the_size(tensors, tmp_path):
    """They write one run, whose name they agree upon though their clocks differ, and everything is said once."""
    clocks = "import os, runpy, time\ntime.strftime = lambda *_: f'at-{os.environ[\"RANK\"]}'\n"
    (tmp_path / "train.py").write_text(f"{clocks}runpy.run_path('train_unet.py', run_name='__main__')\n")
    done = torchrun(tmp_path, "train.py", tensors, "--epochs", 2, *PLAIN)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = (tmp_path / "models/unet/results").iterdir()
    config = json.loads((run / "config.json").read_text())
    assert (config["processes"], config["effective_batch_size"]) == (2, 2)
    assert run.name == config["arguments"]["run_name"] == "at-0"
    for said in ("cache:", "million parameters", "Trained in", "Test Dice", "Written to"):
        assert done.stdout.count(said) == 1, done.stdout
    assert len(re.findall(r"epoch 2/2: 100%[^\r\n]*vol/s", done.stderr)) <= 2  # when it is measured, and at its end

    run_script("train_unet.py", tensors, "--epochs", 2, *PLAIN, "--batch-size", 2, "--run-name", "one", cwd=tmp_path)
    one = tmp_path / "models/unet/results/one"
    for ours, expected in zip(curve(run), curve(one), strict=True):
        assert ours == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "flags"), [(3, []), (2, ["--accumulate", 2, "--ema", 0.9])])
def test_patches_are_learnt_in_shares_that_do_not_divide(native, tmp_path, processes, flags):
    """Ten cases to train on; of the one validation case, two processes have none."""
    flags = ["--patch", 32, "--epochs", 2, *SMALL, "--run-name", "run", *flags]
    done = torchrun(tmp_path, "train_unet.py", native, *flags, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(curve(tmp_path / RUN)) == 2 and all(math.isfinite(x) for row in curve(tmp_path / RUN) for x in row)


# ---- ending together -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_one_process_may_not_do_ends_all_and_is_said_once(tensors, tmp_path):
    """A name that is in use, which only the first process knows, and one that is taken, which all find out; after a
    refusal torchrun may start them again, and they are refused again."""
    lock = tmp_path / RUN / ".lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("1 elsewhere")
    done = torchrun(tmp_path, "train_unet.py", tensors, "--run-name", "run")
    assert done.returncode == 1 and done.stderr.count("error: models") == 1, done.stderr
    assert "process 1 on elsewhere is training here" in done.stderr and [*lock.parent.iterdir()] == [lock]
    lock.unlink()
    run_script("train_unet.py", tensors, *SMALL, "--epochs", 1, "--run-name", "run", cwd=tmp_path)
    before = (tmp_path / RUN / "config.json").read_bytes()
    done = torchrun(tmp_path, "train_unet.py", tensors, *SMALL, "--epochs", 1, "--run-name", "run", restarts=1)
    assert done.returncode == 1 and done.stderr.count("already holds a run") == 2, done.stderr
    assert (tmp_path / RUN / "config.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("disturbance", "said"),
    [("os.kill(os.getpid(), signal.SIGKILL)", "Signal 9"), ("time.sleep(3600)", "Timed out waiting 20000ms")],
)
def test_a_process_that_is_killed_or_hangs_ends_the_others(tensors, tmp_path, disturbance, said):
    (tmp_path / "train.py").write_text(IN_EPOCH_2.format(disturbance))
    done = torchrun(tmp_path, "train.py", tensors, *SMALL, "--epochs", 3, "--run-name", "run")
    assert done.returncode == 1 and done.stderr.count("another process of this job has ended") == 1, done.stderr
    assert said in done.stderr and "models/training.py" not in done.stderr
    assert len(curve(tmp_path / RUN)) == 1


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="--nproc-per-node 4: each process takes a GPU, and this machine has 2"):
        join_processes(torch.device("cuda"))


def test_what_the_first_process_refuses_is_refused_in_the_others(monkeypatch):
    """The messages stand in a list, in place of a network."""
    messages = []
    monkeypatch.setattr(device, "world_size", lambda: 2)
    monkeypatch.setattr(device.dist, "broadcast_object_list", lambda objects: messages.append(objects[0]))

    def refuse():
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        decided_once(refuse)
    monkeypatch.setattr(device, "rank", lambda: 1)
    monkeypatch.setattr(device.dist, "broadcast_object_list", lambda objects: objects.__setitem__(0, messages[0]))
    with pytest.raises(InputError, match="no"):
        decided_once(lambda: pytest.fail("this is the first one's to decide"))


# ---- started again -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_training_that_torchrun_starts_again_ends_like_an_undisturbed_one(tensors, tmp_path):
    """Bit for bit, though a process was killed in the second epoch."""
    (tmp_path / "train.py").write_text(IN_EPOCH_2.format("os.kill(os.getpid(), signal.SIGKILL)"))
    flags = tensors, *SMALL, "--epochs", 4, "--run-name"
    whole = torchrun(tmp_path, "train_unet.py", *flags, "whole", restarts=2)
    killed = torchrun(tmp_path, "train.py", *flags, "run", restarts=2)
    assert whole.returncode == killed.returncode == 0, killed.stderr
    assert "Resuming models/unet/results/run after epoch 1." in killed.stdout
    runs_of_both = tmp_path / RUN, tmp_path / "models/unet/results/whole"
    assert curve(runs_of_both[0]) == curve(runs_of_both[1])
    for file in ("best.pt", "last.pt"):
        ours, expected = (torch.load(run / file, weights_only=True) for run in runs_of_both)
        assert all(torch.equal(ours["model"][name], value) for name, value in expected["model"].items())


def test_only_the_run_that_this_call_of_torchrun_began_goes_on_by_itself(tmp_path, monkeypatch):
    (tmp_path / "last.pt").touch()

    def record(torchrun_id, *resumptions):
        resumptions = [{"torchrun_id": one, "changed": {}} for one in resumptions]
        begun = {"torchrun_id": torchrun_id, "arguments": {}, "resumptions": resumptions}
        (tmp_path / "config.json").write_text(json.dumps(begun))

    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    record(None)
    assert not resuming.restarted(tmp_path)  # without torchrun
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    ours = device.torchrun_id()
    record(ours)
    assert resuming.restarted(tmp_path)
    record("other", ours)
    assert resuming.restarted(tmp_path)
    record(ours, "other")
    assert not resuming.restarted(tmp_path)
    record(ours)
    (tmp_path / "last.pt").unlink()
    assert not resuming.restarted(tmp_path)  # it begins anew: no epoch is over
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "b")
    assert device.torchrun_id() != ours


def test_a_training_that_may_be_started_again_needs_a_name(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(InputError, match="--run-name"):
        runs.choose_folder("unet", None)
    assert runs.choose_folder("unet", "named").name == "named"
