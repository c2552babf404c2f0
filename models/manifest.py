"""What a folder of preprocessed cases says of itself: manifest.json, splits.json and failures.csv.

One process writes them, or several that share a cohort: each keeps a `manifest-shard-I-of-N.json` of its own, and the
last one to finish merges these. Nothing here imports torch: a run that finds everything done need not wait for it.
"""

import csv
import io
import json
import os
import random
from importlib.metadata import version
from pathlib import Path

from models.brats import InputError, write_atomically


def manifest_path(out: Path, shard: tuple[int, int] | None = None) -> Path:
    return out / ("manifest-shard-{}-of-{}.json".format(*shard) if shard else "manifest.json")


def open_manifest(out: Path, run: dict, names: list[str], shard: tuple[int, int] | None) -> dict:
    """What is known of the cases in `out`, with the settings of `run`: those of `names` alone for a shard.

    Args:
        run: everything that all shards have to agree upon; its "settings" are what decides a tensor's content.
        shard: (index, count), or None.

    What other settings have made is forgotten before this returns: without splits.json nobody trains on a mixture of
    old and new tensors, however this run ends. Raises InputError where another shard was started with other flags.
    """
    manifest = {"settings": run["settings"], "versions": _versions(), "cases": {}}
    whole = _read(manifest_path(out))
    if whole and whole["settings"] == run["settings"]:
        manifest = whole
    else:
        _forget(out, whole, run["settings"])
    if shard:
        own = manifest_path(out, shard)
        earlier = _read(own)
        refuse_other_flags(out, run, shard)
        parts = [earlier]
    else:
        parts = [_read(path) for path in _shard_paths(out)]
    for part in parts:
        if part and part["run"]["settings"] == run["settings"]:
            manifest["cases"] |= part["cases"]
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(out) if entry.name.endswith(".pt")}
    wanted = set(names) if shard else manifest["cases"].keys()
    manifest["cases"] = {
        name: entry
        for name, entry in manifest["cases"].items()
        if name in wanted and sizes.get(f"{name}.pt") == entry["bytes"]
    }
    if shard:
        manifest = {"run": run, "versions": manifest["versions"], "cases": manifest["cases"]}
        write_manifest(own, manifest)
        try:
            refuse_other_flags(out, run, shard)  # again: one of two that start at once sees the other's file now
        except InputError:
            own.unlink()
            raise
    return manifest


def _forget(out: Path, old: dict | None, settings: dict):
    if old:
        changes = [f"{key} {old['settings'].get(key)}, now {value}" for key, value in settings.items()
                   if old["settings"].get(key) != value]  # fmt: skip
        print(f"{out} was made with other settings ({'; '.join(changes)}): every case is made again.")
    (out / "splits.json").unlink(missing_ok=True)
    manifest_path(out).unlink(missing_ok=True)


def refuse_other_flags(out: Path, run: dict, shard: tuple[int, int]):
    for index in range(shard[1]):
        path = manifest_path(out, (index, shard[1]))
        other = _read(path) if index != shard[0] else None
        if other and other["run"] != run:
            theirs, ours = ({**each, **each["settings"]} for each in (other["run"], run))
            changes = [f"{key} {theirs.get(key)}, here {ours[key]}" for key in ours
                       if key != "settings" and theirs.get(key) != ours[key]]  # fmt: skip
            raise InputError(f"{path.name}: that shard was started with other flags or other raw cases "
                             f"({'; '.join(changes)}). Give all shards the same, or remove the file.")


def write_manifest(path: Path, manifest: dict):
    manifest["cases"] = dict(sorted(manifest["cases"].items()))
    write_atomically(path, json.dumps(manifest, indent=1))


def merge_shards(out: Path, run: dict, count: int) -> tuple[dict, dict[str, str]] | list[int]:
    """(manifest, failures) of the whole cohort, or the shards that have not finished.

    Several processes may do this at the same time: all of them get the same result from the same files.
    """
    parts = [_read(manifest_path(out, (index, count))) for index in range(count)]
    unfinished = [index for index, part in enumerate(parts) if not part or "failures" not in part]
    if unfinished:
        return unfinished
    whole = _read(manifest_path(out)) or {"cases": {}}
    cases, failures = whole["cases"], {}
    for part in parts:
        cases |= part["cases"]
        failures |= part["failures"]
    cases = {name: entry for name, entry in cases.items() if name not in failures}
    versions = whole.get("versions", parts[0]["versions"])
    return {"settings": run["settings"], "versions": versions, "cases": cases}, failures


def finish(out: Path, manifest: dict, failures: dict[str, str], seed: int, folds: int) -> dict | None:
    """Write manifest.json, failures.csv and splits.json, in this order; returns the splits, None for too few cases."""
    write_manifest(manifest_path(out), manifest)
    failures_csv = out / "failures.csv"
    if failures:
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([("case", "reason"), *sorted(failures.items())])
        write_atomically(failures_csv, table.getvalue())
    else:
        failures_csv.unlink(missing_ok=True)
    patients = {name: entry["patient"] for name, entry in manifest["cases"].items() if entry["labelled"]}
    try:
        splits = make_splits(patients, seed, folds)
        write_atomically(out / "splits.json", json.dumps(splits, indent=1))
    except InputError as error:
        splits = None
        (out / "splits.json").unlink(missing_ok=True)
        print(f"No splits.json: {error}")
    for path in _shard_paths(out):
        path.unlink(missing_ok=True)
    return splits


def make_splits(patients: dict[str, str], seed: int, folds: int) -> dict:
    """80 / 10 / 10 % of the patients, and cross-validation folds over train + validation.

    Args:
        patients: case name -> patient; two visits of a patient never cross a split.

    Raises InputError below three patients.
    """
    cases_of: dict[str, list[str]] = {}
    for case, patient in sorted(patients.items()):
        cases_of.setdefault(patient, []).append(case)
    order = sorted(cases_of)
    if len(order) < 3:
        raise InputError(f"too few cases to split: {len(order)} labelled patients, at least 3 are needed.")
    random.Random(seed).shuffle(order)
    held_out = max(1, round(0.1 * len(order)))

    def cases(of_patients):
        return sorted(case for patient in of_patients for case in cases_of[patient])

    test, validation, train = order[:held_out], order[held_out : 2 * held_out], order[2 * held_out :]
    rest = validation + train
    parts = [rest[k :: min(folds, len(rest))] for k in range(min(folds, len(rest)))]
    return {
        "seed": seed,
        "train": cases(train),
        "validation": cases(validation),
        "test": cases(test),
        "folds": [
            {"train": cases(p for p in rest if p not in part), "validation": cases(part)} for part in map(set, parts)
        ],
    }


def _shard_paths(out: Path) -> list[Path]:
    return sorted(out.glob("manifest-shard-*-of-*.json"))


def _read(path: Path) -> dict | None:
    """A manifest as it was written; None where there is none, or another shard has just removed it."""
    try:
        manifest = json.loads(path.read_text())
        if isinstance(manifest["cases"], dict) and (manifest.get("settings") or manifest["run"]["settings"]):
            return manifest
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        pass
    print(f"{path} cannot be read: its cases are made again.")
    return None


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "numpy", "nibabel")}
