"""config.json of a training: writing what it began with, and comparing when it is resumed.

It is written before the first step and from then on only appended to: every --resume adds an entry to its list
`resumptions`.
"""

import json
import platform
import sys
import zlib
from pathlib import Path

import torch

from models import cost
from models.dataset import manifest_checksum, preprocessing_of_cases
from models.device import AMP_DTYPES, decided_once, device_name, rank, torchrun_id, world_size
from models.errors import InputError
from models.files import git_commit, portable, write_atomically
from models.records import LAST, RESUMED, misfit
from models.runs import (
    FREE_FLAGS,
    PRETRAINED,
    checkpoint_file,
    current_arguments,
    latest,
    load_checkpoint,
    patients_seen,
    read_record,
    refuse_other_network,
)


def restarted(folder: Path) -> bool:
    """Whether torchrun has started the training of that folder again after one of its processes ended, and there is a
    last.pt to resume from. A training of an earlier command is another one, though its name is the same."""
    ours = torchrun_id()
    begun = ours and (folder / "last.pt").is_file()
    return decided_once(lambda: bool(begun) and latest(read_record(folder)).get("torchrun_id") == ours)


def record_to_resume(folder: Path, model, arguments: dict, split: dict[str, list[str]]) -> dict | None:
    """config.json of the run that these arguments (name of a flag -> value) resume; None for a new run.

    InputError for a new run where there is one already, and for a resumed one that differs from what it began with:
    other data, other cases, other settings, another network, or fewer epochs. An "auto" fits whatever was chosen. After
    a whole epoch the number of processes may change, and with it --batch-size and --accumulate if the effective batch
    size stays the same.
    """
    last = folder / "last.pt"
    if not arguments["resume"]:
        # best.pt alone can be what was left of a first epoch, but not where it has not been trained there.
        if last.exists() or folder.name in PRETRAINED or "imported_from" in read_record(folder):
            raise InputError(f"{folder} already holds a run. Choose another --run-name, or go on with --resume.")
        return None
    if not last.is_file():
        raise InputError(f"--resume: {last} does not exist. Name the run with --run-name, or start one without "
                         "--resume.")  # fmt: skip
    record = read_record(folder)
    if not record:
        raise InputError(f"--resume: {folder / 'config.json'} is missing: it says what the run began with.")
    if wrong := misfit(record, RESUMED):
        raise InputError(f"--resume: {folder / 'config.json'} does not say all that the run began with: {wrong}.")
    if wrong := misfit(load_checkpoint(last, mmap=True), LAST):
        raise InputError(f"--resume: {last} cannot be resumed from: {wrong}.")
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
    refuse_other_network(last, model)
    return record


def _free_flags(last: Path, latest: dict, arguments: dict) -> tuple[str, ...]:
    """The flags that may change now. InputError where the number of processes changes within an epoch."""
    if world_size() == latest["processes"]:
        return FREE_FLAGS
    if "progress" in load_checkpoint(last, mmap=True):
        raise InputError(f"--resume: {last} was saved within an epoch shared by {latest['processes']} processes. "
                         "Resume with as many until it is over.")  # fmt: skip
    same_batch = effective_batch_size(arguments) == latest["effective_batch_size"]
    return (*FREE_FLAGS, "batch_size", "accumulate") if same_batch else FREE_FLAGS


def effective_batch_size(arguments: dict) -> int:
    """Cases per update."""
    return arguments["batch_size"] * arguments["accumulate"] * world_size()


def write_record(
    folder: Path, earlier: dict | None, model, arguments: dict, split: dict[str, list[str]], size: list[int], device
):
    """Print what the training will cost, and write config.json; with `earlier` (see `record_to_resume`) append to it.

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
            record["initial_weights"] = _initial_weights(checkpoint_file(arguments["init"]))
    else:
        resumption = _resumption(folder, earlier, arguments, circumstances)
        record = earlier | {"resumptions": [*earlier.get("resumptions", ()), resumption]}
    write_atomically(folder / "config.json", json.dumps(record, indent=1))


def _resumption(folder: Path, earlier: dict, arguments: dict, circumstances: dict) -> dict:
    """The entry of a resumption: where the run goes on, which arguments have changed, and the circumstances. Printed
    as well."""
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
    """Which checkpoint a training began with, by a checksum that a later one of the same name has not, and the patients
    that it was trained on."""
    return {"checkpoint": portable(path), "epoch": load_checkpoint(path, mmap=True)["epoch"],
            "crc32": f"{zlib.crc32(path.read_bytes()):08x}",
            "patients": sorted(patients_seen(read_record(path.parent)) or ())}  # fmt: skip
