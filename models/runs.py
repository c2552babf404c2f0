"""A trained run: its folder, its record (config.json) and its checkpoints; beginning, resuming and opening one.

config.json is written before the first step and from then on only appended to: every --resume adds an entry to its list
`resumptions`.
"""

import json
import os
import platform
import socket
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from models import NETWORKS, build_model, cost, with_defaults
from models.brats import MODALITIES, patient_of
from models.dataset import manifest_checksum, preprocessing_of_cases
from models.device import AMP_DTYPES, decided_once, device_name, rank, torchrun_id, world_size
from models.errors import InputError, one_line
from models.files import ROOT, git_commit, portable, remove_temporaries, whole_file, write_atomically
from models.records import CHECKPOINT, CHECKPOINT_FORMAT, LAST, RECORD, RESUMED, misfit, read_json
from models.tensors import load_tensors

PRETRAINED = "pretrained"  # the run of a network that comes with the project
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
    checkpoint_file = _checkpoint_file(path)
    checkpoint = load_checkpoint(checkpoint_file, mmap=True)
    folder = checkpoint_file.resolve().parent
    record = read_record(folder)
    arguments = current_arguments(record) if "arguments" in record else {}
    data, fold = arguments.get("data"), arguments.get("fold")
    return Run(
        name=checkpoint["network"] if folder.name == PRETRAINED else folder.name,
        folder=checkpoint_file.parent,
        checkpoint=checkpoint_file,
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
    path = _checkpoint_file(path)
    checkpoint = load_checkpoint(path)
    try:
        model = build_model(checkpoint["network"], **checkpoint["config"])
    except Exception as error:  # whatever a network makes of settings that are none
        raise InputError(f"{path}: its settings build no network ({one_line(error, 160)}).") from None
    load_weights(model, checkpoint, path)
    return model.to(device).eval(), checkpoint


def load_initial_weights(model, path: str | Path, split: dict[str, list[str]]):
    """Give a network the weights of a run (its folder, or a checkpoint file). InputError unless that is a network with
    the same settings; a warning where these weights were trained on patients that the new run is to be scored on."""
    path = _checkpoint_file(path)
    _refuse_other_network(path, model)
    load_weights(model, load_checkpoint(path), path)
    seen = patients_seen(read_record(path.parent)) or ()
    known = [case for part in ("validation", "test") for case in split[part] if patient_of(case) in seen]
    if known and rank() == 0:
        print(f"Warning: --init: {portable(path)} was trained on {len(known)} of the validation and test cases "
              f"({known[0]}): their scores will be too good.", file=sys.stderr)  # fmt: skip


def pretrained_checkpoint(network: str) -> Path:
    """The weights of this network that come with the project (see models/pretrained.py)."""
    return ROOT / "models" / network / "results" / PRETRAINED / "best.pt"


def _checkpoint_file(path: str | Path) -> Path:
    """Of a run's folder its best.pt; of a network's name the weights that come with the project."""
    path = Path(path)
    if str(path) in NETWORKS and not (path / "best.pt").exists():
        return pretrained_checkpoint(str(path))
    return path / "best.pt" if path.is_dir() else path


def load_checkpoint(path: Path, mmap: bool = False) -> dict:
    """The dict in a checkpoint file of ours; anything else is an InputError. With `mmap`, for those who look at the
    rest alone, the weights are not read; the file must not be written to while the dict is alive."""
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint. Train first, or name a run such as models/unet/results/<run>.")
    checkpoint = load_tensors(path, mapped=mmap, checked=not mmap)
    if wrong := misfit(checkpoint, CHECKPOINT):
        raise InputError(f"{path}: not a checkpoint of this project's training scripts ({wrong}).")
    if tuple(checkpoint["modalities"]) != MODALITIES:
        raise InputError(f"{path}: trained on the channels {tuple(checkpoint['modalities'])}, not {MODALITIES}.")
    return checkpoint


def load_weights(model, checkpoint: dict, path: Path):
    try:
        model.load_state_dict(checkpoint["model"], strict=True)
    except Exception as error:  # RuntimeError for weights of another network, anything for what is none
        reason = one_line(error, 160)
        raise InputError(f"{path}: its weights do not fit {model.network} {model.config}: {reason}") from None


# ---- the folder ----------------------------------------------------------------------------------------------------


def choose_folder(network: str, name: str | None) -> Path:
    """The folder of a run, below the repository wherever the command was given; without a name it is called after the
    time. All processes get the same one. Nothing is created."""
    if name is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        raise InputError("--max-restarts: name the run with --run-name, or it is not found again after a restart.")
    name = name or decided_once(lambda: time.strftime("%Y%m%d-%H%M%S"))
    folder = ROOT / "models" / network / "results" / name
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder  # shorter to read and to type


def restarted(folder: Path) -> bool:
    """Whether torchrun has started the training of that folder again after one of its processes ended, and there is
    something to go on from. That of an earlier command is another training, though its name is the same."""
    ours = torchrun_id()
    begun = ours and (folder / "last.pt").is_file()
    return decided_once(lambda: bool(begun) and latest(read_record(folder)).get("torchrun_id") == ours)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and hold it, so that a second training of the same name is refused and not mixed with this one.

    The lock is a file that names a process and its machine. One whose process is gone is taken over, if it ran on this
    machine; of the processes of others nothing is known.
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
                f"{lock.parent}: process {pid} on {machine or 'an unknown machine'} trains here. Choose another "
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


# ---- the record ----------------------------------------------------------------------------------------------------


def record_to_resume(folder: Path, model, arguments: dict, split: dict[str, list[str]]) -> dict | None:
    """What config.json says of the run that these arguments (name of a flag -> value) resume; None for a new run.

    InputError for a new run where there is one already, and for a resumed one that would go on with anything else than
    it began with: other data, other cases, other settings, another network, or fewer epochs. An "auto" fits whatever
    was chosen. After a whole epoch the number of processes may be another, and with it --batch-size and --accumulate
    where the effective batch size stays as it was.
    """
    last = folder / "last.pt"
    if not arguments["resume"]:
        if last.exists():
            raise InputError(f"{folder} holds a run already. Choose another --run-name, or go on with --resume.")
        return None
    if not last.is_file():
        raise InputError(f"--resume: {last} does not exist. Say which run with --run-name, or begin it without "
                         "--resume.")  # fmt: skip
    record = read_record(folder)
    if not record:
        raise InputError(f"--resume: {folder / 'config.json'} is missing, so it is not known what the run began with.")
    if wrong := misfit(record, RESUMED):
        raise InputError(f"--resume: {folder / 'config.json'} does not say all that the run began with: {wrong}.")
    if wrong := misfit(load_checkpoint(last, mmap=True), LAST):
        raise InputError(f"--resume: {last} is nothing that a training could go on from: {wrong}.")
    if record["data_manifest_sha256"] != manifest_checksum(arguments["data"]):
        raise InputError(f"--resume: {arguments['data']} is not the data that {folder} was trained on (its manifest "
                         f"differs from {record['arguments']['data']}).")  # fmt: skip
    before = current_arguments(record)
    free = _free_flags(last, latest(record), arguments)
    changed = [
        f"--{flag.replace('_', '-')} {'not given' if arguments[flag] is None else arguments[flag]} (the run: {value})"
        for flag, value in before.items()
        if flag in arguments and flag not in free and arguments[flag] not in (value, "auto")
    ]
    if arguments["epochs"] < before["epochs"]:
        changed.append(f"--epochs {arguments['epochs']} (the run: {before['epochs']}; only more are possible)")
    if changed:
        raise InputError(f"--resume: {folder} is not what these flags ask for: {', '.join(changed)}.")
    if record["split"] != split:
        raise InputError(f"--resume: {arguments['data']}/splits.json is not the split that {folder} was trained on: "
                         "its validation cases may have been trained on.")  # fmt: skip
    _refuse_other_network(last, model)
    return record


def _free_flags(last: Path, latest: dict, arguments: dict) -> tuple[str, ...]:
    """The flags that may change now, with the number of processes; that may only where the last epoch is over."""
    if world_size() == latest["processes"]:
        return FREE_FLAGS
    if "progress" in load_checkpoint(last, mmap=True):
        raise InputError(f"--resume: {last} stands within an epoch that {latest['processes']} processes share. Resume "
                         "with as many until it is over.")  # fmt: skip
    same_batch = effective_batch_size(arguments) == latest["effective_batch_size"]
    return (*FREE_FLAGS, "batch_size", "accumulate") if same_batch else FREE_FLAGS


def _refuse_other_network(path: Path, model):
    checkpoint = load_checkpoint(path, mmap=True)
    trained, asked = (
        {key: value for key, value in json.loads(json.dumps(config)).items() if key not in RUNTIME_SETTINGS}
        for config in (with_defaults(checkpoint["network"], checkpoint["config"]), model.config)
    )
    if checkpoint["network"] != model.network or trained != asked:
        raise InputError(f"{path}: a {checkpoint['network']} of {checkpoint['config']}, not what these flags ask for.")


def current_arguments(record: dict) -> dict:
    """The arguments with what the resumptions have changed."""
    return ADDED_FLAGS | latest(record)["arguments"]


def latest(record: dict) -> dict:
    """The record with what its resumptions say in place of what it said before."""
    for resumption in record.get("resumptions", ()):
        record = record | resumption | {"arguments": record["arguments"] | resumption["changed"]}
    return record


def effective_batch_size(arguments: dict) -> int:
    """Cases per update."""
    return arguments["batch_size"] * arguments["accumulate"] * world_size()


def write_record(
    folder: Path, earlier: dict | None, model, arguments: dict, split: dict[str, list[str]], size: list[int], device
):
    """Say what the training will cost, and write config.json; with `earlier` (see `record_to_resume`) append to it.

    Args:
        arguments: name of a flag -> value, without "auto".
        size: of what the network takes, [D, H, W] voxels.
    """
    if rank() != 0:
        return
    costs = cost.of_training(model, (arguments["batch_size"], 4, *size), AMP_DTYPES[arguments["amp"]])
    print(f"{model.network}: {costs['parameters'] / 1e6:.1f} million parameters; {costs['gmac']:.1f} GMAC = "
          f"{2 * costs['gmac'] / 1e3:.3f} TFLOP per volume of {' x '.join(map(str, size))} voxels; expected peak "
          f"of a training step {costs['expected_peak_gib']:.2f} GiB of tensors (batch {arguments['batch_size']}).")
    data = arguments["data"]
    arguments = arguments | {"data": portable(data), "run_name": folder.name}
    circumstances = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": device_name(device),
        "processes": world_size(),
        "effective_batch_size": effective_batch_size(arguments),
        "torchrun_id": torchrun_id(),
    }
    if earlier is None:
        record = {
            "network": model.network,
            "model": model.config,
            "size": size,
            "preprocessing": preprocessing_of_cases(data),
            "arguments": arguments,
            "data_manifest_sha256": manifest_checksum(data),
            "split": split,
            **costs,
            **circumstances,
        }
        if arguments["init"]:
            record["initial_weights"] = _initial_weights(_checkpoint_file(arguments["init"]))
    else:
        resumption = _resumption(folder, earlier, arguments, circumstances)
        record = earlier | {"resumptions": [*earlier.get("resumptions", ()), resumption]}
    write_atomically(folder / "config.json", json.dumps(record, indent=1))


def _resumption(folder: Path, earlier: dict, arguments: dict, circumstances: dict) -> dict:
    """The circumstances, after which epoch and step the run goes on, and which arguments have changed; printed as
    well."""
    before, last = current_arguments(earlier), load_checkpoint(folder / "last.pt", mmap=True)
    after = {"after_epoch": last["epoch"]} | ({"after_step": last["progress"][0]["step"]} if "progress" in last else {})
    changed = {key: value for key, value in arguments.items() if key != "resume" and before.get(key) != value}
    said = [f"--{key.replace('_', '-')} is {value}, was {before.get(key)}" for key, value in changed.items()]
    for key, words in (("processes", "the number of processes"),
                       ("effective_batch_size", "the effective batch size (--batch-size x --accumulate x processes)")):
        if circumstances[key] != (was := latest(earlier)[key]):
            said.append(f"{words} is {circumstances[key]}, was {was}")
    place = " and ".join(f"{key.removeprefix('after_')} {number}" for key, number in after.items())
    print("; ".join([f"Resuming {folder} after {place}", *said]) + ".")
    return after | {"changed": changed, **circumstances}


def _initial_weights(path: Path) -> dict:
    """Which checkpoint a training began with, so that it can be told from a later one of the same name, and what it has
    seen."""
    return {"checkpoint": portable(path), "epoch": load_checkpoint(path, mmap=True)["epoch"],
            "crc32": f"{zlib.crc32(path.read_bytes()):08x}",
            "patients": sorted(patients_seen(read_record(path.parent)) or ())}  # fmt: skip


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
    with whole_file(path) as file:
        torch.save(content, file)
