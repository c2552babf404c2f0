"""A trained run: its folder, and its checkpoints with the config.json beside them, opened, checked and saved."""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from models import NETWORKS, build_model, with_defaults
from models.brats import MODALITIES, patient_of
from models.dataset import preprocessing_of_cases
from models.device import decided_once, rank
from models.errors import InputError, one_line
from models.files import ROOT, portable, remove_temporaries, whole_file
from models.records import CHECKPOINT, CHECKPOINT_FORMAT, RECORD, misfit, read_json
from models.tensors import load_tensors

PRETRAINED = ("pretrained", "pretrained-heads")  # runs that come with the project, in the folders of their networks
FEW_PATIENTS = 50  # to train with: below, weights of synthetic heads are suggested
RUNTIME_SETTINGS = ("attention", "checkpointing")  # of a network: speed and memory; what it computes is the same
# Flags that older records do not name, and what they would have said.
ADDED_FLAGS = {"patch": None, "regions": False, "augmentation": "basic", "copy_paste": 0.0, "ema": 0.0, "init": None,
               "deterministic": False, "save_minutes": 10.0}  # fmt: skip
# The flags that a resumed run may have changed: what a step computes does not depend on them. DATA may have moved; its
# content is compared.
FREE_FLAGS = ("data", "epochs", "device", "cache", "workers", "compile", "run_name", "resume", "save_minutes", "debug",
              *RUNTIME_SETTINGS)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A trained run, as its checkpoint and the config.json beside it describe it. Where there is no config.json, what
    only it knows is None."""

    name: str
    folder: Path
    checkpoint: Path
    network: str  # as build_model takes it, with `config`
    config: dict
    epoch: int
    amp: str  # as --amp, without "auto"
    size: list[int] | None  # of what the network takes, [D, H, W] voxels: whole cases, or patches or windows of them
    preprocessing: dict | None  # of its cases: arguments of preprocessing.to_network
    inference: dict  # what prediction in windows is to do otherwise than by default (see inference.predict.member_of)
    data: Path | None
    data_sha256: str | None  # see dataset.manifest_checksum
    split: dict[str, list[str]] | None
    seen: set[str] | None  # patients that its weights, or those that it began with, were trained on
    fold: int | None  # of its data, that it was validated on
    settings: dict  # of the training, but for the fold: flags that change what a network learns


# ---- opening -------------------------------------------------------------------------------------------------------


def open_run(path: str | Path) -> Run:
    """The run in a folder, or that of a checkpoint file. InputError where there is none or it is damaged."""
    file = checkpoint_file(path)
    checkpoint = load_checkpoint(file, mmap=True)
    folder = file.resolve().parent
    record = read_record(folder)
    arguments = current_arguments(record) if "arguments" in record else {}
    data, fold = arguments.get("data"), arguments.get("fold")
    return Run(
        name=folder.name.replace("pretrained", checkpoint["network"]) if folder.name in PRETRAINED else folder.name,
        folder=file.parent,
        checkpoint=file,
        network=checkpoint["network"],
        config=checkpoint["config"],
        epoch=checkpoint["epoch"],
        amp=checkpoint.get("amp", "off"),
        size=record.get("size"),
        preprocessing=_preprocessing(record),
        inference=record.get("inference", {}),
        data=ROOT / data if data else None,
        data_sha256=record.get("data_manifest_sha256"),
        split=record.get("split"),
        seen=patients_seen(record),
        fold=fold if isinstance(fold, int) else None,
        settings={flag: value for flag, value in arguments.items() if flag not in {*FREE_FLAGS, "fold"} - {"epochs"}},
    )


def read_record(folder: Path) -> dict:
    """What config.json says; empty where there is none: a checkpoint can be used without its folder."""
    path = folder / "config.json"
    return read_json(path, RECORD) if path.exists() else {}


def current_arguments(record: dict) -> dict:
    """The arguments with what the resumptions have changed."""
    return ADDED_FLAGS | latest(record)["arguments"]


def latest(record: dict) -> dict:
    """The record with what its resumptions say in place of what it said before."""
    for resumption in record.get("resumptions", ()):
        record = record | resumption | {"arguments": record["arguments"] | resumption["changed"]}
    return record


def patients_seen(record: dict) -> set[str] | None:
    """The patients that a run's weights, or those that it began with, were trained on; None where it does not say."""
    if "split" not in record:
        return None
    return {*map(patient_of, record["split"]["train"]), *record.get("initial_weights", {}).get("patients", ())}


def _preprocessing(record: dict) -> dict | None:
    if "preprocessing" in record or not {"size", "spacing_mm"} <= record.keys():
        return record.get("preprocessing")
    # A record of before there was a choice: cubes, scaled to 0-1.
    return {"size": record["size"][0], "spacing_mm": record["spacing_mm"], "normalize": "percentile"}


def load_model(path: str | Path, device="cpu") -> tuple[torch.nn.Module, dict]:
    """The trained network of a run (its folder, or a checkpoint file) in evaluation mode, and its checkpoint.

    A missing, damaged or mismatched file is an InputError: weights are loaded strictly or not at all.
    """
    path = checkpoint_file(path)
    checkpoint = load_checkpoint(path)
    try:
        model = build_model(checkpoint["network"], **checkpoint["config"])
    except Exception as error:  # a network can raise anything for nonsensical settings
        raise InputError(f"{path}: no network can be built from its settings ({one_line(error, 160)}).") from None
    load_weights(model, checkpoint, path)
    return model.to(device).eval(), checkpoint


def network_flags(path: str | Path, flags: dict) -> dict:
    """Those of a training script's flags that choose the network, with the values that they have in a run."""
    checkpoint = load_checkpoint(checkpoint_file(path), mmap=True)
    config = with_defaults(checkpoint["network"], checkpoint["config"])
    config["no_attention"] = not config.get("use_attention", True)
    return {flag: value for flag, value in config.items() if flag in flags and flag not in RUNTIME_SETTINGS}


def load_initial_weights(model, path: str | Path, data: Path, split: dict[str, list[str]]):
    """Give a network the weights of a run (its folder, or a checkpoint file). InputError unless that is a network with
    the same settings; a warning where these weights were trained on patients that the new run is to be scored on, or on
    images of another scale than those of `data`."""
    path = checkpoint_file(path)
    refuse_other_network(path, model)
    load_weights(model, load_checkpoint(path), path)
    if rank() != 0:
        return
    record, start = read_record(path.parent), f"Warning: --init: {portable(path)} was trained on"
    seen = patients_seen(record) or ()
    known = [case for part in ("validation", "test") for case in split[part] if patient_of(case) in seen]
    if known:
        print(f"{start} {len(known)} of the validation and test cases ({known[0]}): their scores will be too good.",
              file=sys.stderr)  # fmt: skip
    scale, of_data = (_preprocessing(record) or {}).get("normalize"), preprocessing_of_cases(data)["normalize"]
    if scale and scale != of_data:
        print(f"{start} cases of --normalize {scale}, and {data} has those of --normalize {of_data}: its weights will "
              "help less.", file=sys.stderr)  # fmt: skip


def suggest_heads(model, data: Path, split: dict[str, list[str]]):
    """For a training of few patients from random weights: name the weights of synthetic heads, if they fit."""
    path = pretrained_checkpoint(model.network, heads=True)
    if rank() != 0 or len({*map(patient_of, split["train"])}) >= FEW_PATIENTS or not path.exists():
        return
    try:
        refuse_other_network(path, model)
    except InputError:
        return
    if _preprocessing(read_record(path.parent))["normalize"] == preprocessing_of_cases(data)["normalize"]:
        print(f"Few patients: a training with --init {model.network}-heads would begin with weights of synthetic "
              "heads, which helped networks of three to nine patients (README, Results).")  # fmt: skip


def pretrained_checkpoint(network: str, heads: bool) -> Path:
    """The weights of this network that come with the project (see models/pretrained.py); `heads`: those of synthetic
    heads alone."""
    return ROOT / "models" / network / "results" / PRETRAINED[heads] / "best.pt"


def checkpoint_file(path: str | Path) -> Path:
    """The checkpoint that a path stands for: best.pt of a run's folder, or, for the name of a network or such a name
    with -heads, the weights that come with the project; a file stands for itself."""
    path = Path(path)
    network, heads = str(path).removesuffix("-heads"), str(path).endswith("-heads")
    if network in NETWORKS and not (path / "best.pt").exists():
        return pretrained_checkpoint(network, heads)
    return path / "best.pt" if path.is_dir() else path


def load_checkpoint(path: Path, mmap: bool = False) -> dict:
    """The dict in a checkpoint file of ours; anything else is an InputError. With `mmap` the weights are not read until
    they are used; the file must not be written to while the dict is alive."""
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint. Train first, or name a run such as models/unet/results/<run>.")
    checkpoint = load_tensors(path, mapped=mmap, checked=not mmap)
    if wrong := misfit(checkpoint, CHECKPOINT):
        raise InputError(f"{path}: not a checkpoint of this project's training scripts ({wrong}).")
    if tuple(checkpoint["modalities"]) != MODALITIES:
        raise InputError(f"{path}: trained on the channels {tuple(checkpoint['modalities'])}, not {MODALITIES}.")
    return checkpoint


def load_weights(model, checkpoint: dict, path: Path):
    """Give a network the weights of a checkpoint, which was read from `path`. InputError where they do not fit."""
    try:
        model.load_state_dict(checkpoint["model"], strict=True)
    except Exception as error:  # RuntimeError for weights of another network, anything for nonsense
        reason = one_line(error, 160)
        raise InputError(f"{path}: its weights do not fit {model.network} {model.config}: {reason}") from None


def refuse_other_network(path: Path, model):
    """InputError unless a checkpoint file is of a network with the settings of `model`, those of RUNTIME_SETTINGS
    aside."""
    checkpoint = load_checkpoint(path, mmap=True)
    trained, asked = (
        {key: value for key, value in json.loads(json.dumps(config)).items() if key not in RUNTIME_SETTINGS}
        for config in (with_defaults(checkpoint["network"], checkpoint["config"]), model.config)
    )
    if checkpoint["network"] != model.network:
        raise InputError(f"{path}: a {checkpoint['network']}, not a {model.network}.")
    different = [f"{key} {trained.get(key)} (the flags: {asked.get(key)})" for key in trained | asked
                 if trained.get(key) != asked.get(key)]  # fmt: skip
    if different:
        raise InputError(f"{path}: not what these flags ask for: {', '.join(different)}.")


# ---- the folder ----------------------------------------------------------------------------------------------------


def choose_folder(network: str, name: str | None) -> Path:
    """The folder of a run, below the repository whatever the working directory; without a name it is called after the
    date and time. All processes get the same one. Nothing is created."""
    if name is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        raise InputError("--max-restarts: name the run with --run-name, so that it is found again after a restart.")
    name = name or decided_once(lambda: time.strftime("%Y%m%d-%H%M%S"))
    folder = ROOT / "models" / network / "results" / name
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder  # shorter to read and to type


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and hold it, so that a second training of the same name is refused and not mixed with this one.

    The lock is a file that names a process and its machine. It is taken over if that process ran on this machine and is
    gone; nothing is known of the processes of other machines.
    """
    lock = folder / ".lock"
    decided_once(lambda: _take(lock))
    if rank() == 0:
        remove_temporaries(folder)
    try:
        yield
    finally:
        if rank() == 0:
            lock.unlink(missing_ok=True)
            with suppress(OSError):  # not empty: the usual case
                folder.rmdir()


def _take(lock: Path):
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = lock.open("x")  # fails where the file is there: of two processes one gets it
    except FileExistsError:
        owner = lock.read_text(errors="replace")
        pid, _, machine = owner.partition(" ")
        if machine != socket.gethostname() or not pid.isdecimal() or _is_running(int(pid)):
            raise InputError(
                f"{lock.parent}: process {pid} on {machine or 'an unknown machine'} is training here. Choose another "
                f"--run-name, or delete {lock} if that process is gone."
            ) from None
        lock.unlink(missing_ok=True)
        file = lock.open("x")
    with file:
        file.write(f"{os.getpid()} {socket.gethostname()}")


def _is_running(pid: int) -> bool:
    if sys.platform == "win32":  # os.kill would end it there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is somebody else's
        return True
    return True


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def checkpoint_of(model, amp: str, epoch: int, dice_mean: float | None) -> dict:
    """What best.pt holds: the network after so many epochs, its validation score (see metrics.pooled_dice), and what it
    takes to build it."""
    return {
        "format": CHECKPOINT_FORMAT,
        "network": model.network,
        "config": {key: list(value) if isinstance(value, tuple) else value for key, value in model.config.items()},
        "modalities": list(MODALITIES),
        "amp": amp,
        "epoch": epoch,
        "dice_mean": dice_mean,
        "model": model.state_dict(),
    }


def save(path: Path, content: dict):
    """Write a checkpoint, whole or not at all."""
    with whole_file(path) as file:
        torch.save(content, file)
